"""Files of many requests: in this process (`local`), or on the workers of a Ray cluster (`ray`)."""

from mezzotint.bulk.local import BulkPlan, Failure, Failures, Outcome, Worker, plan_memory, prepare, run

__all__ = ["BulkPlan", "Failure", "Failures", "Outcome", "Worker", "plan_memory", "prepare", "run"]
