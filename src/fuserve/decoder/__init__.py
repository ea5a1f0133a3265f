"""Running decoder-only language models: weights, executors, and the step between them."""

from fuserve.decoder.load import LoadedModel, LoadReport, load_model
from fuserve.decoder.options import ExecutorOptions
from fuserve.decoder.step import BLOCK_SIZE_TOKENS, Executor, StepBatch

__all__ = [
    "BLOCK_SIZE_TOKENS",
    "Executor",
    "ExecutorOptions",
    "LoadReport",
    "LoadedModel",
    "StepBatch",
    "load_model",
]
