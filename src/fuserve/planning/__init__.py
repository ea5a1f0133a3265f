"""What a model needs and how fast it would run, on machines that may not be at hand."""

from fuserve.planning.machine import Machine, Network
from fuserve.planning.plan import Candidate, Plan, Wish, make_plan
from fuserve.planning.workload import Workload

__all__ = ["Candidate", "Machine", "Network", "Plan", "Wish", "Workload", "make_plan"]
