"""Read-only measures of how much tasks' gradients disagree.

What belongs here: numbers computed from values (Gramians, directions), never anything that changes a step.
"""

from detente.diagnostics.conflict import measure_conflict

__all__ = ["measure_conflict"]
