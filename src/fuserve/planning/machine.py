"""The hosts and what joins them, as the numbers that bound a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

from fuserve.errors import InvalidRequestError
from fuserve.kernels.linear import WeightFormat
from fuserve.kernels.machine import measure_bandwidth, measure_byte_dot, measure_fp32, num_threads


@dataclass(frozen=True, slots=True)
class Machine:
    """The measured ceilings of one host, as ``fuserve doctor`` shows them.

    Rates are of all its threads together: bytes read and operations done in a second.
    """

    num_threads: int
    read_bytes_per_s: float
    fp32_flop_per_s: float
    int8_op_per_s: float
    int4_op_per_s: float

    @classmethod
    def measured(cls, threads: int | None = None) -> Machine:
        """This machine; takes some seconds."""
        count = num_threads(threads)
        return cls(
            count,
            measure_bandwidth(count),
            measure_fp32(count),
            measure_byte_dot(count, int4=False),
            measure_byte_dot(count, int4=True),
        )

    @classmethod
    def from_report(cls, report: Mapping[str, Any]) -> Machine:
        """The machine on which ``fuserve doctor --json`` gave this report.

        Raises:
            InvalidRequestError: a field is missing or is no positive number.
        """
        values = {}
        for field, name in _REPORT_FIELDS.items():
            value = report.get(name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
                raise InvalidRequestError(
                    f"{name} is {value!r}; it must be a positive number. "
                    "Take the report from: fuserve doctor --json"
                )
            values[field] = value
        return cls(int(values.pop("num_threads")), **{k: float(v) for k, v in values.items()})

    def op_per_s(self, format: WeightFormat, *, in_floats: bool) -> float:
        """The arithmetic ceiling of a product with weights of this format."""
        if in_floats or format < WeightFormat.Q8:
            return self.fp32_flop_per_s
        is_int8 = format in (WeightFormat.Q8, WeightFormat.Q8_CHANNEL)
        return self.int8_op_per_s if is_int8 else self.int4_op_per_s


_REPORT_FIELDS = {
    "num_threads": "measured_threads",
    "read_bytes_per_s": "read_bytes_per_s",
    "fp32_flop_per_s": "fp32_flop_per_s",
    "int8_op_per_s": "int8_op_per_s",
    "int4_op_per_s": "int4_op_per_s",
}


@dataclass(frozen=True, slots=True)
class Network:
    """What joins two hosts: seconds for an empty message, and bytes a second one way."""

    latency_s: float
    bytes_per_s: float

    def send_s(self, num_bytes: int) -> float:
        """One message from one host to another."""
        return self.latency_s + num_bytes / self.bytes_per_s

    def all_reduce_s(self, num_bytes: int, ranks: int) -> float:
        """A sum over all ranks of as many bytes on each: reduce-scatter, then all-gather.

        Each rank sends ``2 (n - 1) / n`` of its bytes, in ``2 ceil(log2 n)`` messages one after
        the other (Thakur, Rabenseifner, Gropp 2005, section 4.4).
        """
        if ranks == 1:
            return 0.0
        return self.num_messages(ranks) * self.latency_s + (
            2 * (ranks - 1) / ranks * num_bytes / self.bytes_per_s
        )

    @staticmethod
    def num_messages(ranks: int) -> int:
        """Messages of an all-reduce that wait for each other."""
        return 2 * ceil(log2(ranks))
