"""The time of a step, as a sum of what it reads, computes and sends.

The shares of the ceilings are what the kernels reach, in AVX2, from one row to hundreds;
``benchmarks/plan_check.py`` prints predictions beside measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuserve.architectures import DecoderSpec
from fuserve.decoder.step import BLOCK_SIZE_TOKENS
from fuserve.kernels.cache import CacheType
from fuserve.planning.layout import Layout, Products, Stage
from fuserve.planning.machine import Machine, Network
from fuserve.planning.memory import block_bytes
from fuserve.planning.workload import Workload

READ_SHARE = 0.87
"""Share of the measured read bandwidth at which products read their weights."""
FLOAT_SHARE = 0.87
"""Share of the fp32 rate that products with floating-point weights reach."""
INTEGER_SHARE = 0.66
"""Share of the int8 and int4 dot product's rate that products with such weights reach."""
HIDDEN_SHARE = 0.5
"""Part of the shorter of reading and arithmetic that a product hides behind the longer."""
CACHE_READ_SHARE = 0.6
"""Share of the read bandwidth at which attention reads keys and values."""
ATTENTION_SHARE = 0.4
"""Share of the fp32 rate that attention reaches in prefill, its softmax included."""


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a time, and how it was reckoned."""

    name: str
    formula: str
    seconds: float


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step carries through a stage.

    Attributes:
        rows: tokens.
        logit_rows: tokens whose logits are wanted.
        cached: tokens whose keys and values are read from the cache, of all sequences together.
        pairs: pairs of a query and a key that attention computes in prefill.
    """

    rows: int
    logit_rows: int
    cached: int = 0
    pairs: int = 0


@dataclass(frozen=True, slots=True)
class Setting:
    """All that the time of a step depends on beside its load."""

    spec: DecoderSpec
    layout: Layout
    machine: Machine
    network: Network
    cache: CacheType

    def step(self, stage: Stage, load: StepLoad) -> list[Term]:
        """The summands of one step of a stage."""
        return [
            *self._products(stage, load),
            *self._attention(stage, load),
            *self._exchange(stage, load),
        ]

    def _products(self, stage: Stage, load: StepLoad) -> list[Term]:
        terms = []
        for part, products, rows in (
            ("layers", stage.layers, load.rows),
            ("head", stage.head, load.logit_rows),
        ):
            for one in products if rows else ():
                terms += self._product(f"{part}, {one.storage.describe()}", one, rows)
        return terms

    def _product(self, name: str, product: Products, rows: int) -> list[Term]:
        num_bytes, num_weights = product.num_bytes, product.num_weights
        read = READ_SHARE * self.machine.read_bytes_per_s
        is_float = product.in_floats or not product.storage.is_integer
        share = FLOAT_SHARE if is_float else INTEGER_SHARE
        rate = self.machine.op_per_s(product.storage.format, in_floats=product.in_floats)
        read_s, multiply_s = num_bytes / read, 2 * num_weights * rows / (share * rate)
        return [
            Term(
                f"{name}: read",
                f"{_giga(num_bytes)} GB / ({READ_SHARE} x "
                f"{_giga(self.machine.read_bytes_per_s)} GB/s)",
                read_s,
            ),
            Term(
                f"{name}: multiply",
                f"2 x {_giga(num_weights)} G weights x {rows} rows / ({share} x "
                f"{_giga(rate)} GOP/s)",
                multiply_s,
            ),
            Term(
                f"{name}: hidden",
                f"{HIDDEN_SHARE} of the shorter of the two",
                -HIDDEN_SHARE * min(read_s, multiply_s),
            ),
        ]

    def _attention(self, stage: Stage, load: StepLoad) -> list[Term]:
        terms = []
        if load.cached:
            per_token = block_bytes(self.spec, stage, self.cache) / BLOCK_SIZE_TOKENS
            num_bytes = round(load.cached * per_token)
            terms.append(
                Term(
                    "attention: read keys and values",
                    f"{load.cached} tokens x {per_token / 1e3:.4g} kB / ({CACHE_READ_SHARE} x "
                    f"{_giga(self.machine.read_bytes_per_s)} GB/s)",
                    num_bytes / (CACHE_READ_SHARE * self.machine.read_bytes_per_s),
                )
            )
        if load.pairs:
            features = stage.num_heads * self.spec.attention.head_dim
            operations = 4 * load.pairs * features * stage.num_layers
            terms.append(
                Term(
                    "attention: scores and values",
                    f"4 x {load.pairs} pairs x {features} features x {stage.num_layers} layers / "
                    f"({ATTENTION_SHARE} x {_giga(self.machine.fp32_flop_per_s)} GFLOP/s)",
                    operations / (ATTENTION_SHARE * self.machine.fp32_flop_per_s),
                )
            )
        return terms

    def _exchange(self, stage: Stage, load: StepLoad) -> list[Term]:
        ranks, network = self.layout.tensor, self.network
        terms = []
        hidden_bytes = 4 * load.rows * self.spec.hidden_size
        if ranks > 1:
            sums = 2 * stage.num_layers + stage.is_first
            terms.append(
                Term(
                    "all-reduces",
                    f"{sums} x ({network.num_messages(ranks)} x {network.latency_s * 1e6:.4g} us + "
                    f"2 x {ranks - 1}/{ranks} x {hidden_bytes / 1e6:.4g} MB / "
                    f"{_giga(network.bytes_per_s)} GB/s)",
                    sums * network.all_reduce_s(hidden_bytes, ranks),
                )
            )
        if ranks > 1 and stage.is_last and load.logit_rows:
            logit_bytes = 4 * load.logit_rows * self.spec.vocab_size * (ranks - 1) // ranks
            terms.append(self._message("gather logits", logit_bytes))
        if not stage.is_last:
            terms.append(self._message("send to the next stage", hidden_bytes))
        return terms

    def _message(self, name: str, num_bytes: int) -> Term:
        formula = (
            f"{self.network.latency_s * 1e6:.4g} us + {num_bytes / 1e6:.4g} MB / "
            f"{_giga(self.network.bytes_per_s)} GB/s"
        )
        return Term(name, formula, self.network.send_s(num_bytes))


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of one copy of the model, and the times they follow from.

    Attributes:
        prefill_one: of one prompt, alone.
        prefill_many: of prompts one after another, all stages busy.
        decode_one: of one stream.
        decode_many: of all sequences together.
        steps: the summands of each stage's step, under what the step is of.
        sums: how these became tokens a second, one line for each speed.
    """

    prefill_one: float
    prefill_many: float
    decode_one: float
    decode_many: float
    steps: dict[str, list[list[Term]]]
    sums: list[str]


def speed_of(setting: Setting, stages: Sequence[Stage], work: Workload) -> Speed:
    """Prefill and decode, of one stream and of many, by the time of each stage's steps."""
    num_stages = len(stages)
    back = setting.network.latency_s if num_stages > 1 else 0.0  # a token returns to stage 1
    windows = [layer.sliding_window for layer in setting.spec.layers]

    def visible(context: int) -> int:
        """Keys that a query sees, on average over the layers."""
        return round(sum(min(context, window or context) for window in windows) / len(windows))

    prompt = work.prompt_tokens
    num_chunks = -(-prompt // work.max_num_batched_tokens)
    rows = -(-prompt // num_chunks)
    # The mean query sees half of the prompt, or its window.
    chunk = StepLoad(rows, 1, pairs=rows * min(visible(prompt), -(-prompt // 2)))
    one = StepLoad(1, 1, cached=visible(work.decode_context))
    micro = -(-work.max_num_seqs // num_stages)
    num_micros = -(-work.max_num_seqs // micro)
    many = StepLoad(micro, micro, cached=micro * visible(work.decode_context))

    names = {"prefill": chunk, "decode, one stream": one, "decode, many": many}
    steps = {name: [setting.step(stage, load) for stage in stages] for name, load in names.items()}
    times = {name: [total(terms) for terms in each] for name, each in steps.items()}

    chunk_s, one_s, many_s = times.values()
    prompt_s = sum(chunk_s) + (num_chunks - 1) * max(chunk_s)
    round_s = max(num_micros * max(many_s), sum(many_s) + back)
    stream_s = sum(one_s) + back
    return Speed(
        prefill_one=prompt / prompt_s,
        prefill_many=rows / max(chunk_s),
        decode_one=1 / stream_s,
        decode_many=work.max_num_seqs / round_s,
        steps=steps,
        sums=[
            f"prefill, one prompt: {prompt} tokens / (sum of the stages {_ms(sum(chunk_s))} + "
            f"{num_chunks - 1} further chunks x slowest {_ms(max(chunk_s))}) = "
            f"{prompt / prompt_s:.4g} tokens/s",
            f"prefill, many: {rows} tokens / slowest stage {_ms(max(chunk_s))} = "
            f"{rows / max(chunk_s):.4g} tokens/s",
            f"decode, one stream: 1 token / (sum of the stages {_ms(sum(one_s))} + "
            f"{_ms(back)} back) = {1 / stream_s:.4g} tokens/s",
            f"decode, many: {work.max_num_seqs} tokens / max({num_micros} micro-batches of {micro} "
            f"x slowest {_ms(max(many_s))}, {_ms(sum(many_s) + back)} once through) = "
            f"{work.max_num_seqs / round_s:.4g} tokens/s",
        ],
    )


def total(terms: Sequence[Term]) -> float:
    """Seconds of all of them."""
    return sum(term.seconds for term in terms)


def _giga(value: float) -> str:
    return f"{value / 1e9:.4g}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"
