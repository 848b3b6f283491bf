"""Adam as a pure function, for the few numbers that a method learns by itself."""

from __future__ import annotations

import numpy as np

from detente.geometry.gramian import Array


def adam_step(
    values: Array,
    moments: Array,
    gradient: Array,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Array, Array]:
    """One step of Adam down a gradient (Kingma & Ba 2015, Algorithm 1), with its state handed in and out.

    Every entry counts its own steps, so that entries may be left out of some steps.

    Args:
        values: [T], what is learned.
        moments: [T, 3]: running mean of the gradient, running mean of its square, number of steps; zeros at first.
        gradient: [T], of the objective with respect to ``values``.
        lr: the length of a step where the gradient keeps its sign.
        betas: how much the running means keep of themselves.
        epsilon: keeps a vanishing gradient from being divided by zero; small beside a typical gradient.
        weight_decay: adds this times ``values`` to the gradient, before the moments.

    Returns:
        The new values [T] and the new moments [T, 3]; the arguments are left as they were.

    Example:
        >>> values, moments = adam_step(np.zeros(2), np.zeros((2, 3)), np.array([5.0, -0.1]), lr=0.1)
        >>> values.round(6).tolist()
        [-0.1, 0.1]
    """
    if weight_decay:
        gradient = gradient + weight_decay * values
    mean = betas[0] * moments[:, 0] + (1 - betas[0]) * gradient
    square = betas[1] * moments[:, 1] + (1 - betas[1]) * gradient * gradient
    steps = moments[:, 2] + 1
    # Both means start at zero: divide by how much of their weight the steps so far have filled.
    direction = mean / (1 - betas[0] ** steps)
    length = np.sqrt(square / (1 - betas[1] ** steps)) + epsilon
    following = np.empty_like(moments)
    following[:, 0], following[:, 1], following[:, 2] = mean, square, steps
    return values - lr * direction / length, following


def mean_gradient(moments: Array, *, beta: float = 0.9) -> Array:
    """Return the running mean [T] of the gradients so far, from the moments [T, 3] of :func:`adam_step`.

    Example:
        >>> _, moments = adam_step(np.zeros(1), np.zeros((1, 3)), np.array([5.0]), lr=0.1)
        >>> mean_gradient(moments).round(6).tolist()
        [5.0]
    """
    mean: Array = moments[:, 0] / (1 - beta ** moments[:, 2])
    return mean
