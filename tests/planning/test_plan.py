"""Memory is what the executor takes; speeds follow from bytes, operations and messages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fuserve.architectures import tensor_shapes
from fuserve.decoder import ExecutorOptions
from fuserve.decoder.native import NativeExecutor
from fuserve.decoder.weights import DummyWeights
from fuserve.errors import CapacityError, InvalidRequestError
from fuserve.planning import Machine, Network, Plan, Wish, Workload, make_plan
from fuserve.planning.memory import num_blocks
from fuserve.planning.model import ConfigWeights
from fuserve.planning.speed import HIDDEN_SHARE, READ_SHARE, total
from tests.planning.shapes import BLOOM_176B, LLAMA, OPT_175B

MACHINE = Machine(2, 20e9, 100e9, 200e9, 300e9)
NETWORK = Network(latency_s=50e-6, bytes_per_s=1e9)
WORK = Workload(max_model_len=512, max_num_seqs=8, prompt_tokens=256, output_tokens=64)
STORED = {"as stored": ExecutorOptions()}
ALL = STORED | {
    "int8": ExecutorOptions(quantization="int8"),
    "int4": ExecutorOptions(quantization="int4"),
}
GB = 10**9


def plan_175b(hosts: int, memory_gb: int, work: Workload = WORK) -> Plan:
    wish = Wish(memory_gb * GB, hosts)
    return make_plan(ConfigWeights(OPT_175B), ALL, MACHINE, NETWORK, work, wish)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_memory_is_what_the_executor_takes(quantization: str | None, kv_cache_dtype: str) -> None:
    options = ExecutorOptions(
        quantization=quantization,  # type: ignore[arg-type]
        kv_cache_dtype=kv_cache_dtype,  # type: ignore[arg-type]
    )
    weights = DummyWeights(ConfigWeights(LLAMA).spec)
    executor = NativeExecutor(weights, options, num_blocks=num_blocks(WORK), max_model_len=512)
    plan = make_plan(
        ConfigWeights(LLAMA), {"it": options}, MACHINE, NETWORK, WORK, Wish(GB, hosts=1)
    )
    (memory,) = plan.candidates[0].memory
    padding = 64 * len(tensor_shapes(weights.spec))
    assert executor.packed_bytes - padding <= memory.weights <= executor.packed_bytes
    assert memory.kv_cache == pytest.approx(executor.kv_cache_bytes, rel=0.01)
    executor.close()


def test_the_hosts_that_are_named_as_enough_are_enough_and_one_less_is_not() -> None:
    with pytest.raises(CapacityError, match=r"as stored 349\.3 GB \(\d+ such hosts\)"):
        plan_175b(4, 16)
    fits = plan_175b(40, 16).fits
    assert fits["int4"].min_hosts is not None
    for name, fit in fits.items():
        assert fit.min_hosts is not None
        enough = plan_175b(fit.min_hosts, 16).candidates
        assert name in {one.scheme for one in enough}
        if fit.min_hosts > fits["int4"].min_hosts:
            fewer = plan_175b(fit.min_hosts - 1, 16).candidates
            assert name not in {one.scheme for one in fewer}


def test_everything_offered_fits_and_the_hosts_are_used_up() -> None:
    plan = plan_175b(24, 16)
    assert len({one.layout for one in plan.candidates}) > 4
    for one in plan.candidates:
        assert max(memory.total for memory in one.memory) <= 16 * GB
        assert one.replicas * one.layout.num_ranks <= 24 < (one.replicas + 1) * one.layout.num_ranks
    rates = [one.tokens_per_s for one in plan.candidates]
    assert rates == sorted(rates, reverse=True)


def test_bloom_is_planned_from_its_config_alone() -> None:
    wish = Wish(512 * GB, 1)
    plan = make_plan(ConfigWeights(BLOOM_176B), STORED, MACHINE, NETWORK, WORK, wish)
    assert plan.fits["as stored"].weight_bytes == pytest.approx(2 * 176.2e9, rel=0.005)


def test_a_stream_is_decoded_at_the_speed_of_its_bytes_and_operations() -> None:
    plan = make_plan(ConfigWeights(LLAMA), STORED, MACHINE, NETWORK, WORK, Wish(GB, hosts=1))
    speed = plan.candidates[0].speed
    num_weights = 6 * (256 * 256 * 2 + 2 * 64 * 256 + 3 * 512 * 256) + 1024 * 256
    read_s = 2 * num_weights / (READ_SHARE * 20e9)
    multiply_s = 2 * num_weights / (0.87 * 100e9)
    cache_s = (256 + 32) * 6 * 2 * 2 * 32 * 2 / (0.6 * 20e9)
    product_s = read_s + multiply_s - HIDDEN_SHARE * min(read_s, multiply_s)
    assert 1 / speed.decode_one == pytest.approx(product_s + cache_s, rel=1e-6)


def test_each_all_reduce_costs_its_messages_and_its_bytes() -> None:
    assert NETWORK.all_reduce_s(10**6, 1) == 0.0
    assert NETWORK.all_reduce_s(10**6, 2) == pytest.approx(2 * 50e-6 + 1e-3)
    assert NETWORK.all_reduce_s(10**6, 4) == pytest.approx(4 * 50e-6 + 1.5e-3)
    wish = Wish(GB, hosts=2, tensor_parallel=2)
    plan = make_plan(ConfigWeights(LLAMA), STORED, MACHINE, NETWORK, WORK, wish)
    ((terms,),) = [plan.candidates[0].speed.steps["decode, one stream"]]
    (reduce,) = [term for term in terms if term.name == "all-reduces"]
    assert reduce.seconds == pytest.approx(13 * NETWORK.all_reduce_s(4 * 256, 2))  # 2 x 6 + 1


def test_stages_share_many_streams_but_not_one() -> None:
    work = replace(WORK, max_num_seqs=32)
    free = Network(latency_s=1e-9, bytes_per_s=1e15)

    def speed(pipeline: int) -> tuple[float, float]:
        wish = Wish(GB, hosts=pipeline, pipeline_parallel=pipeline)
        plan = make_plan(ConfigWeights(LLAMA), STORED, MACHINE, free, work, wish)
        (one,) = [c for c in plan.candidates if c.layout.pipeline == pipeline]
        assert total(one.speed.steps["decode, one stream"][0]) > 0
        return one.speed.decode_one, one.speed.decode_many

    (one, many), (one_of_2, many_of_2) = speed(1), speed(2)
    assert one_of_2 == pytest.approx(one, rel=0.01)
    assert 1.2 * many < many_of_2 < 2 * many


def test_a_slower_network_hurts_tensor_parallelism_most() -> None:
    slow = Network(latency_s=1e-3, bytes_per_s=1e8)
    wish = Wish(GB, hosts=2)

    def streams(network: Network) -> dict[int, float]:
        plan = make_plan(ConfigWeights(LLAMA), STORED, MACHINE, network, WORK, wish)
        return {
            one.layout.tensor: one.speed.decode_one
            for one in plan.candidates
            if one.layout.num_ranks == 2
        }

    fast, slowed = streams(NETWORK), streams(slow)
    assert slowed[2] / fast[2] < slowed[1] / fast[1] < 1


def test_a_split_that_the_model_does_not_allow_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="divide the 8 heads"):
        make_plan(
            ConfigWeights(LLAMA), STORED, MACHINE, NETWORK, WORK, Wish(GB, 3, tensor_parallel=3)
        )
