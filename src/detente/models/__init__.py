"""Networks with a shared part and one head for each task."""

from detente.models.lenet import LeNet
from detente.models.output import Output

__all__ = ["LeNet", "Output"]
