"""Metrics: pure functions, with thin accumulators where a data set is larger than a batch."""

from detente.metrics.classification import RunningAccuracy, accuracy, correct
from detente.metrics.delta import delta_m, relative_changes

__all__ = ["RunningAccuracy", "accuracy", "correct", "delta_m", "relative_changes"]
