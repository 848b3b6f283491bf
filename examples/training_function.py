"""A training loop of one's own, made comparable by a decorator and two lines inside.

detente sweep examples/training_function.py:train --methods uniform mgda --seeds 3 --epochs 20
"""

import torch

import detente
from detente.experiments import training_function
from detente.records import Metric


def curves(seed):
    """Two functions of one number, with noise: a made-up problem."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(200, 1, generator=generator) * 4 - 2
    noise = torch.randn(200, 2, generator=generator) * 0.1
    return x, torch.cat([x.sin(), 10 * x.square()], dim=1) + noise


@training_function([Metric("wave", "error", False, False), Metric("bowl", "error", False, False)])
def train(method, config):
    """Fit a wave and a bowl with one network."""
    torch.manual_seed(config.seed)
    network = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    names = (
        {"wave": 0, "bowl": 1} if config.task == "all" else {config.task: ("wave", "bowl").index(config.task)}
    )
    x, y = curves(0)
    for _ in range(config.epochs):
        for rows in torch.randperm(len(x)).split(50):
            output = network(x[rows])
            losses = {name: (output[:, i] - y[rows, i]).square().mean() for name, i in names.items()}
            # This was sum(losses.values()).backward().
            detente.backward(losses, method, shared=network.parameters())
            optimizer.step()
            optimizer.zero_grad()

    def measure(seed):
        inputs, targets = curves(seed)
        with torch.no_grad():
            errors = (network(inputs) - targets).abs().mean(dim=0)
        return {name: {"error": float(errors[i])} for name, i in names.items()}

    return {"validation": measure(1), "test": measure(2)}
