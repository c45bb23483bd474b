"""Files of many requests: in this process (`local`), or on the workers of a Ray cluster (`ray`)."""

from mezzotint.bulk.local import Failure, Failures, Outcome, Plan, Worker, fit, prepared, run

__all__ = ["Failure", "Failures", "Outcome", "Plan", "Worker", "fit", "prepared", "run"]
