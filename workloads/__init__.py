"""What can be trained and measured: digits, and whatever has the form of a ``Workload``."""

from hogstream.workloads.model_workload import ModelWorkload
from hogstream.workloads.workload import Target, Workload, check_workload

__all__ = ["ModelWorkload", "Target", "Workload", "check_workload"]
