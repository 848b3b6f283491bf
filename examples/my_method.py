"""A method of one's own, as one file.

detente run multimnist --method examples/my_method.py:Loudest --epochs 1
"""

import torch

import detente
from detente.methods import Declaration


class Loudest(detente.Method):
    """The task whose loss is largest gets all the weight.

    Example:
        >>> import torch
        >>> detente.combine(Loudest(), torch.eye(2), losses=[1.0, 3.0]).direction
        tensor([0., 1.])
    """

    declares = Declaration(
        name="loudest", source="this file", needs=frozenset({"losses"}), permutation="exact"
    )

    def solve(self, gradients):
        weights = torch.zeros(gradients.tasks, dtype=torch.float64)
        weights[int(torch.as_tensor(gradients.losses).argmax())] = 1.0
        return detente.Combination(weights=weights)
