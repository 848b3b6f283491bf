"""Three targets from real measurements: 442 patients, the diabetes data that ship with scikit-learn.

detente sweep examples/diabetes.py:Diabetes --methods uniform mgda aligned-mtl --front 5 --epochs 30 --seeds 5
"""

import torch
from sklearn.datasets import load_diabetes
from torch import nn

from detente.records import Metric
from detente.training import TensorProblem


class Network(nn.Module):
    """A trunk of two layers and a linear head for each target."""

    def __init__(self, inputs, tasks):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(16, 1) for task in tasks})

    def forward(self, x):
        features = self.trunk(x)
        return {"features": features, **{task: head(features)[:, 0] for task, head in self.heads.items()}}

    def shared_parameters(self):
        return list(self.trunk.parameters())

    def last_shared_parameters(self):
        return list(self.trunk[2].parameters())


class Diabetes(TensorProblem):
    """Progression of the disease, body mass index and blood pressure from age, sex and six blood values."""

    metrics = tuple(Metric(task, "error", False, False) for task in ("progression", "bmi", "pressure"))
    learning_rates = (0.003, 0.01, 0.03, 0.1)

    def data(self, name):
        table = load_diabetes()
        x = (
            torch.tensor(table.data, dtype=torch.float32) * 21
        )  # each column then has a standard deviation of one
        targets = {
            "progression": (torch.tensor(table.target, dtype=torch.float32) - 152) / 77,
            "bmi": x[:, table.feature_names.index("bmi")],
            "pressure": x[:, table.feature_names.index("bp")],
        }
        inputs = x[
            :, [place for place, column in enumerate(table.feature_names) if column not in ("bmi", "bp")]
        ]
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        rows = dict(zip(("train", "validation", "test"), order.split([262, 80, 100]), strict=True))[name]
        return inputs[rows], {task: values[rows] for task, values in targets.items()}

    def model(self):
        return Network(8, self.tasks)

    def losses(self, output, labels):
        return {task: (output[task] - labels[task]).square().mean() for task in self.tasks}

    def scores(self, output, labels):
        return {task: {"error": (output[task] - labels[task]).abs()} for task in self.tasks}

    def features(self, output):
        return output["features"]
