"""Files of many requests: in this process (`local`), or on the workers of a Ray cluster (`ray`)."""

from mezzotint.bulk.folder import Failures
from mezzotint.bulk.local import BulkPlan, Failure, Outcome, Worker, plan_memory, prepare, run

__all__ = ["BulkPlan", "Failure", "Failures", "Outcome", "Worker", "plan_memory", "prepare", "run"]
