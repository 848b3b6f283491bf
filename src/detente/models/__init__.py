"""Networks with a shared part and one head for each task."""

from detente.models.lenet import LeNet
from detente.models.output import Branching, Output

__all__ = ["Branching", "LeNet", "Output"]
