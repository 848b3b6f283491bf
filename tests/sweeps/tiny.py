"""Two targets of three numbers: a problem whose runs take milliseconds."""

import torch

from detente.records import Metric
from detente.training import TensorProblem


class Tiny(TensorProblem):
    """The sum of three numbers, and the sign of the first."""

    metrics = (
        Metric("sum", "error", higher_is_better=False, percent=False),
        Metric("sign", "accuracy", higher_is_better=True, percent=True),
        Metric("sign", "loss", higher_is_better=False, percent=False),
    )
    learning_rates = (0.01, 0.1)

    def data(self, name):
        generator = torch.Generator().manual_seed({"train": 1, "validation": 2, "test": 3}[name])
        x = torch.randn(48, 3, generator=generator)
        noise = 0.3 * torch.randn(48, generator=generator)
        return x, {"sum": x.sum(1) + noise, "sign": (x[:, 0] + noise > 0).long()}

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))

    def losses(self, output, labels):
        return {
            "sum": (output[:, 0] - labels["sum"]).square().mean(),
            "sign": torch.nn.functional.cross_entropy(output[:, 1:], labels["sign"]),
        }

    def scores(self, output, labels):
        loss = torch.nn.functional.cross_entropy(output[:, 1:], labels["sign"], reduction="none")
        return {
            "sum": {"error": (output[:, 0] - labels["sum"]).abs()},
            "sign": {"accuracy": (output[:, 1:].argmax(1) == labels["sign"]).float(), "loss": loss},
        }
