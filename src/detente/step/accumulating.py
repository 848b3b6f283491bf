"""One step from several micro-batches, with one decision for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from detente.autograd.accumulation import Accumulation
from detente.methods.base import Method


@contextmanager
def accumulate(method: Method, parts: int) -> Iterator[None]:
    """Within this context :func:`backward` adds up task gradients, and combines them in the last of ``parts`` calls.

    The method sees the losses, the gradients and the one Gramian of the whole accumulated batch, as if it had fitted
    into memory at once. (The other way to accumulate is to call :func:`backward` several times without this context,
    with losses divided by ``parts``: then every micro-batch has weights of its own, and the method takes a step each
    time.)

    Gradients are taken on the parameters (exact), one backward for each task and micro-batch, also for methods that
    look at losses only: their weights are known at the end. On several processes nothing is sent before the last call
    but each one's announcement and the sum of its T losses.

    Args:
        method: the method that will be passed to :func:`backward`.
        parts: number of micro-batches, >= 1. They count alike, or by ``samples=`` of each call.

    Raises:
        ValueError: ``parts`` is no whole number >= 1, the contexts of one method are nested, or it ends after fewer
            calls.

    Example:
        >>> import torch, detente
        >>> trunk, left, right = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        >>> method = detente.create("mgda")
        >>> with detente.accumulate(method, 2):
        ...     for part in torch.ones(8, 3).split(4):
        ...         z = trunk(part)
        ...         losses = {"left": left(z).square().mean(), "right": right(z).square().mean()}
        ...         record = detente.backward(losses, method)
        ...         print(record.status, trunk.weight.grad is not None)
        accumulating False
        ok True
    """
    if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
        raise ValueError(f"parts is {parts!r}; give the number of micro-batches, a whole number >= 1.")
    if method.__dict__.get("accumulation") is not None:
        raise ValueError("accumulate() is already active for this method; end that context first.")
    accumulation = method.__dict__["accumulation"] = Accumulation(parts)
    try:
        yield
        if accumulation.done != parts:
            raise ValueError(
                f"accumulate() was told of {parts} micro-batches, and backward() was called for {accumulation.done}. "
                "Nothing was written to .grad. Pass the true number, also where an epoch ends with fewer."
            )
    finally:
        del method.__dict__["accumulation"]
