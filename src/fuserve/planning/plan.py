"""Which split of which scheme fits, and which of them is fastest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from fuserve.architectures import DecoderSpec
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.weights import DecoderWeights
from fuserve.errors import CapacityError, InvalidRequestError
from fuserve.planning.layout import CutModel, Layout, Stage, cuts_evenly
from fuserve.planning.machine import Machine, Network
from fuserve.planning.memory import RankMemory, rank_memory
from fuserve.planning.speed import Setting, Speed, speed_of
from fuserve.planning.workload import Workload

MOST_HOSTS = 4096
"""Where the search for enough hosts ends."""


@dataclass(frozen=True, slots=True)
class Wish:
    """The hosts at hand, and what is asked of them.

    Attributes:
        memory_bytes: that a rank may use on each host; a host runs one rank.
        hosts: how many there are.
        tensor_parallel: ranks that share each layer; None tries all.
        pipeline_parallel: stages; None tries all.
    """

    memory_bytes: int
    hosts: int
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None

    def layouts(self, spec: DecoderSpec, ranks: int) -> Iterator[Layout]:
        """All splits into exactly so many ranks that the model allows."""
        for tensor in range(1, ranks + 1):
            pipeline, rest = divmod(ranks, tensor)
            if rest or pipeline > spec.num_layers or not cuts_evenly(spec, tensor):
                continue
            if self.tensor_parallel not in (None, tensor):
                continue
            if self.pipeline_parallel in (None, pipeline):
                yield Layout(tensor, pipeline)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scheme and a split that fit; ``replicas`` copies use the hosts up."""

    scheme: str
    layout: Layout
    replicas: int
    stages: tuple[Stage, ...]
    memory: tuple[RankMemory, ...]
    speed: Speed

    @property
    def tokens_per_s(self) -> float:
        """Decoded by all copies together."""
        return self.replicas * self.speed.decode_many


@dataclass(frozen=True, slots=True)
class SchemeFit:
    """How a scheme fits: its whole size, and the fewest hosts that hold it (None: not found)."""

    weight_bytes: int
    min_hosts: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """All that fits, the fastest first, and how each scheme fits."""

    candidates: tuple[Candidate, ...]
    fits: Mapping[str, SchemeFit]


def make_plan(
    weights: DecoderWeights,
    schemes: Mapping[str, ExecutorOptions],
    machine: Machine,
    network: Network,
    work: Workload,
    wish: Wish,
) -> Plan:
    """Try every split of every scheme.

    Args:
        weights: of the model; only shapes and types are asked for.
        schemes: how weights may be held, by the names that the plan shows.
        machine: ceilings of each host.
        network: between hosts.
        work: sequences to serve.
        wish: hosts, their memory, and splits to try.

    Raises:
        CapacityError: nothing fits; the message tells how many hosts would do.
        InvalidRequestError: the model allows none of the splits.
    """
    spec = weights.spec
    candidates: list[Candidate] = []
    fits: dict[str, SchemeFit] = {}
    if not any(any(wish.layouts(spec, ranks)) for ranks in range(1, wish.hosts + 1)):
        raise InvalidRequestError(_no_layout(spec, wish))
    for name, options in schemes.items():
        scheme = _Scheme(weights, options, work)
        for ranks in range(1, wish.hosts + 1):
            for layout in wish.layouts(spec, ranks):
                memory = scheme.memory(layout)
                if max(one.total for one in memory) > wish.memory_bytes:
                    continue
                setting = Setting(spec, layout, machine, network, scheme.cache)
                stages = scheme.stages(layout)
                speed = speed_of(setting, stages, work)
                replicas = wish.hosts // ranks
                candidates.append(Candidate(name, layout, replicas, stages, memory, speed))
        fits[name] = SchemeFit(scheme.weight_bytes, scheme.min_hosts(wish))
    if not candidates:
        raise CapacityError(_too_small(spec, fits, work, wish))
    candidates.sort(key=lambda one: (-one.tokens_per_s, -one.speed.decode_one))
    return Plan(tuple(candidates), fits)


class _Scheme:
    """A model held in one way, cut as often as is asked."""

    def __init__(self, weights: DecoderWeights, options: ExecutorOptions, work: Workload) -> None:
        self._spec = weights.spec
        self._work = work
        self._cut = cache(lambda ranks: CutModel(weights, options, ranks))
        self.cache = self._cut(1).cache
        self.weight_bytes = self._cut(1).weight_bytes

    def stages(self, layout: Layout) -> tuple[Stage, ...]:
        return self._cut(layout.tensor).stages(layout.pipeline)

    def memory(self, layout: Layout) -> tuple[RankMemory, ...]:
        return tuple(
            rank_memory(self._spec, stage, self.cache, self._work) for stage in self.stages(layout)
        )

    def min_hosts(self, wish: Wish) -> int | None:
        """The fewest ranks of one copy that fit."""
        fewest = max(1, self.weight_bytes // wish.memory_bytes)
        for ranks in range(fewest, MOST_HOSTS + 1):
            for layout in wish.layouts(self._spec, ranks):
                if max(one.total for one in self.memory(layout)) <= wish.memory_bytes:
                    return ranks
        return None


def _no_layout(spec: DecoderSpec, wish: Wish) -> str:
    attention = spec.attention
    return (
        f"{wish.hosts} hosts cannot be split as asked: tensor parallelism must divide the "
        f"{attention.num_heads} heads, and there are {spec.num_layers} layers for pipeline stages. "
        "Leave "
        "--tensor-parallel-size and --pipeline-parallel-size out to see what can be done."
    )


def _too_small(spec: DecoderSpec, fits: Mapping[str, SchemeFit], work: Workload, wish: Wish) -> str:
    needs = ", ".join(
        f"{name} {fit.weight_bytes / 1e9:.4g} GB"
        + (f" ({fit.min_hosts} such hosts)" if fit.min_hosts else " (never fits)")
        for name, fit in fits.items()
    )
    return (
        f"nothing fits {wish.hosts} x {wish.memory_bytes / 1e9:.4g} GB with a cache for "
        f"{work.max_num_seqs} sequences of {work.max_model_len} tokens. The weights are: {needs}. "
        "Give more --hosts or --memory, a shorter --max-model-len or fewer --max-num-seqs."
    )
