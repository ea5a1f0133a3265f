"""From a model argument to an executor over several ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fuserve.decoder.load import (
    LoadedModel,
    LoadReport,
    load_model,
    model_cache_dtype,
    open_weights,
    unreserved_memory,
)
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.packing import Progress
from fuserve.decoder.weights import DecoderWeights
from fuserve.errors import InvalidRequestError, MissingExtraError
from fuserve.parallel.assignment import Assignment
from fuserve.parallel.balance import balanced_stages
from fuserve.parallel.group_executor import GroupExecutor
from fuserve.parallel.layer_costs import layer_bytes, layer_seconds
from fuserve.parallel.layout import GroupLayout
from fuserve.parallel.local_start import LocalStart
from fuserve.parallel.options import ParallelOptions
from fuserve.parallel.placement import threads_of_ranks
from fuserve.parallel.running import StartRanks
from fuserve.parallel.shard_loading import ShardReport, plan_ranks
from fuserve.parallel.slots import SlotSizes
from fuserve.parallel.torchrun import started_by_torchrun

if TYPE_CHECKING:
    from fuserve.parallel.torch_start import TorchStart


def load_parallel(
    model: str,
    options: ExecutorOptions,
    parallel: ParallelOptions,
    progress: Progress | None = None,
    *,
    reserved_bytes: int = 0,
) -> LoadedModel:
    """Load a model into this process and the ranks beside it, or into this process alone.

    The ranks are processes of this host, or, where ``torchrun`` has started this process, those
    that it has started on all hosts.

    Args:
        model: as of ``load_model``.
        options: of each rank; ``num_threads`` None shares out the usable cores.
        parallel: how many ranks.
        progress: called with what is done, how many of how many.
        reserved_bytes: of this host's free memory, kept for what is loaded later.

    Raises:
        RankFailedError: a rank does not start, or has another model or version.
        InvalidRequestError: the model cannot be divided so.
        FuserveError: as ``load_model``.
    """
    if parallel.num_ranks == 1 and not started_by_torchrun():
        return load_model(model, options, progress, reserved_bytes=reserved_bytes)
    if options.executor != "native":
        raise InvalidRequestError(
            "the reference executor runs in one process: leave out the parallel sizes, or use "
            "executor='native'"
        )
    start_s = time.perf_counter()
    checkpoint, weights = open_weights(model, options)
    # Decided of the whole model: of a part, it could be something else.
    options = replace(options, kv_cache_dtype=model_cache_dtype(weights, options))
    layout = _layout(weights, options, parallel)
    sizes = SlotSizes(
        max_tokens=max(options.max_num_batched_tokens, options.max_num_seqs),
        hidden_size=weights.spec.hidden_size,
        vocab_size=weights.spec.vocab_size,
        num_slots=layout.num_stages + 1,
    )
    start: StartRanks
    if started_by_torchrun():
        assignment = Assignment(model, options, layout, sizes, parallel.step_timeout_s)
        start = torch_start = _torch_start()(
            checkpoint, weights, assignment, parallel.join_timeout_s, reserved_bytes
        )
        plan = torch_start.plan
    else:
        num_threads = threads_of_ranks(layout.num_ranks, options.num_threads)
        options = replace(options, num_threads=num_threads)
        assignment = Assignment(model, options, layout, sizes, parallel.step_timeout_s)
        ranks = range(layout.num_ranks)
        plan = plan_ranks(weights, options, layout, ranks, unreserved_memory(reserved_bytes))
        start = LocalStart(checkpoint, weights, assignment, plan, parallel)
    executor = GroupExecutor(weights.spec, plan.num_blocks, layout, sizes, start, progress)
    report = _report(executor.reports, time.perf_counter() - start_s)
    return LoadedModel(executor, weights.spec, checkpoint, plan.max_model_len, report)


def _torch_start() -> type[TorchStart]:
    try:
        from fuserve.parallel.torch_start import TorchStart
    except ImportError as error:
        raise MissingExtraError("torch", "torch", "a group over several hosts") from error
    return TorchStart


def _layout(
    weights: DecoderWeights, options: ExecutorOptions, parallel: ParallelOptions
) -> GroupLayout:
    num_stages = parallel.pipeline_parallel_size
    if num_stages > 1 and parallel.balance == "measured":
        costs = layer_seconds(weights, options)
    else:
        costs = layer_bytes(weights, options)
    return GroupLayout(parallel.tensor_parallel_size, balanced_stages(costs, num_stages))


def _report(reports: Sequence[ShardReport], load_s: float) -> LoadReport:
    """All ranks as one."""
    formats = {name: form for report in reports for name, form in report.formats.items()}
    return LoadReport(
        load_s=load_s,
        packed_bytes=sum(report.packed_bytes for report in reports),
        bytes_read_per_token=sum(report.bytes_read_per_token for report in reports),
        from_cache=all(report.from_cache for report in reports),
        num_threads=sum(report.num_threads for report in reports),
        isa=reports[0].isa,
        kv_cache_bytes=sum(report.kv_cache_bytes for report in reports),
        formats=formats,
    )
