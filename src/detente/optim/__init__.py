"""Optimizers that keep moments for every task: MAO, MTAdam; and what each task contributes to an update.

What belongs here: ``torch.optim.Optimizer`` subclasses that are given losses and do the backwards themselves, and the
analysis of contributions. Methods that combine gradients for any optimizer are in ``detente.methods``.
"""

from detente.optim.balance import TaskBalance
from detente.optim.contributions import Contributions
from detente.optim.mao import MAO
from detente.optim.mtadam import MTAdam

__all__ = ["MAO", "MTAdam", "Contributions", "TaskBalance"]
