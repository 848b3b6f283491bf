"""The training loop: one problem, one method, one run folder.

What belongs here: what the loop needs of a problem (`problem`, and `tensors` for the shortest way to one), its
typed configuration (`config`), the choice of epochs on validation data (`selection`) and the measuring (`evaluation`),
saving and exact resuming (`checkpoint`), what moves the parameters (`steps`), several processes (`launch`,
`processes`), and the loop itself (`loop`).
The loop never knows a method's name.
"""

from detente.training.config import TrainingConfig
from detente.training.evaluation import evaluate
from detente.training.loop import train
from detente.training.problem import Problem, Split
from detente.training.tensors import TensorProblem

__all__ = ["Problem", "Split", "TensorProblem", "TrainingConfig", "evaluate", "train"]
