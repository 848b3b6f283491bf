"""Optimizers that keep moments for every task: MAO, MTAdam; and what each task contributes to an update.

What belongs here: ``torch.optim.Optimizer`` subclasses that are given losses and do the backwards themselves, the
analysis of contributions, and the registry of optimizers that a run may name. Methods that combine gradients for any
optimizer are in ``detente.methods``.
"""

from detente.optim.balance import TaskBalance
from detente.optim.contributions import Contributions
from detente.optim.mao import MAO
from detente.optim.mtadam import MTAdam
from detente.optim.registry import OptimizerInfo, OptimizerName, UnknownOptimizer, create, info_of, optimizers

__all__ = [
    "MAO",
    "MTAdam",
    "Contributions",
    "OptimizerInfo",
    "OptimizerName",
    "TaskBalance",
    "UnknownOptimizer",
    "create",
    "info_of",
    "optimizers",
]
