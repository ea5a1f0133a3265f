"""A client that loads an OpenAI-compatible server and measures what its users would see.

It knows a server by its HTTP alone, so that it measures other servers exactly as it measures ours.
"""

from fuserve.loadgen.client import Answer, Completer, Target
from fuserve.loadgen.drive import Run, drive
from fuserve.loadgen.report import Percentiles, ServingReport, summarize
from fuserve.loadgen.vocabulary import Vocabulary, find_vocabulary
from fuserve.loadgen.workload import PlannedRequest, TokenRange, Workload, plan

__all__ = [
    "Answer",
    "Completer",
    "Percentiles",
    "PlannedRequest",
    "Run",
    "ServingReport",
    "Target",
    "TokenRange",
    "Vocabulary",
    "Workload",
    "drive",
    "find_vocabulary",
    "plan",
    "summarize",
]
