"""Losses as a caller hands them over, and what may be wrong with them or with their gradients.

Every message names the task. All checks of numbers happen on the host, after the one copy of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from detente.autograd.host import to_host
from detente.autograd.layout import Gradients, finite, probes


class GradientNotFinite(ValueError):
    """Say that a gradient is NaN or infinite; under a gradient scaler that happens, and the step is skipped."""


Losses: TypeAlias = Mapping[str, torch.Tensor] | Sequence[torch.Tensor]


def named_losses(losses: Losses) -> tuple[tuple[str, ...], list[torch.Tensor]]:
    """Return names and scalars of the tasks of a step; unnamed losses are called by their position.

    Raises:
        ValueError: no losses, one tensor instead of several, two tasks of one name, a loss that is not a scalar or has
            no graph.
        TypeError: a loss is not a tensor.

    Example:
        >>> named_losses([torch.ones(1, requires_grad=True).sum()])[0]
        ('0',)
    """
    if isinstance(losses, torch.Tensor):
        raise ValueError(
            "losses is one tensor; give the separate scalars, as a mapping from task name to loss or a list. "
            "(A backward through a stacked tensor walks the heads of all tasks.)"
        )
    values = values_of(losses)
    if not values:
        raise ValueError("losses is empty; give at least one loss.")
    names = tuple(map(str, losses if isinstance(losses, Mapping) else range(len(values))))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"task {twice!r} occurs twice; task names must differ.")
    for name, loss in zip(names, values, strict=True):
        if not isinstance(loss, torch.Tensor):
            raise TypeError(f"the loss of task {name!r} is a {type(loss).__name__}, not a tensor.")
        check_scalar(name, loss)
        if not loss.requires_grad:
            raise ValueError(
                f"the loss of task {name!r} has no graph; it was detached, computed under torch.no_grad(), or "
                "depends on no parameter that requires a gradient. Leave the task out of this step, or multiply "
                "its prediction by zero to keep the connection."
            )
    return names, values


def values_of(losses: Mapping[str, Any] | Sequence[Any]) -> list[Any]:
    """Return the losses without their names, in order."""
    return list(losses.values()) if isinstance(losses, Mapping) else list(losses)


def check_scalar(name: str, loss: torch.Tensor) -> None:
    """Check that a loss is one real number.

    Raises:
        ValueError: it is not; the task is named.
    """
    if loss.numel() != 1:
        raise ValueError(f"the loss of task {name!r} has shape {tuple(loss.shape)}; reduce it to a scalar.")
    if loss.is_complex():
        raise ValueError(f"the loss of task {name!r} is complex; a loss is a real number.")


def check_losses(names: Sequence[str], losses: np.ndarray | None) -> None:
    """Check that every loss [T] is finite.

    Raises:
        ValueError: one is not; the task is named.
    """
    if losses is None or np.isfinite(losses).all():
        return
    name = next(name for name, loss in zip(names, losses, strict=True) if not np.isfinite(loss))
    raise ValueError(_not_finite(name, "the loss"))


def check_gradients(
    names: Sequence[str], sizes: np.ndarray, space: str = "exact", what: str | None = None
) -> None:
    """Check that every task's gradient is finite, by the square of each [T], or True where it is.

    ``what`` tells which gradient; by default the shared one of ``space``.

    Raises:
        ValueError: one is not; the task is named.
    """
    known = np.isfinite(sizes) if sizes.dtype != np.bool_ else sizes
    if known.all():
        return
    if what is None:
        what = "the gradient with respect to the features" if space == "features" else "the shared gradient"
    raise GradientNotFinite(_not_finite(names[int(np.argmin(known))], what))


def check_own(names: Sequence[str], own: Sequence[Gradients], probed: np.ndarray) -> None:
    """Check that the gradients of own parameters are finite, by the probe of each.

    Raises:
        ValueError: one is not; the task is named.
    """
    offset = 0
    for name, task in zip(names, own, strict=True):
        mine = probed[offset : offset + len(task)]
        offset += len(task)
        if not _all_finite(task, mine):
            raise GradientNotFinite(_not_finite(name, "the gradient of its own parameters"))


def check_behind(names: Sequence[str], gradients: Gradients) -> None:
    """Check that the gradients behind the place where the problem was solved are finite.

    Raises:
        ValueError: one is not. No task can be named: one backward serves them all.
    """
    probed = probes(g for _, g in gradients)
    if not probed or np.isfinite(to_host([torch.stack([p.to(probed[0]) for p in probed]).sum()])[0]):
        return
    if not finite([g for _, g in gradients], np.full(len(gradients), np.nan)).all():
        raise GradientNotFinite(
            f"the gradients of tasks {', '.join(names)} are finite where the problem was solved and not finite "
            "(NaN or Inf) behind it, in the shared parameters. Nothing was changed."
        )


def check_weighted(names: Sequence[str], gradients: Gradients, probed: np.ndarray) -> None:
    """Check that the gradients of weighted losses are finite, by the probe of each.

    Raises:
        ValueError: one is not. No task can be named: one backward serves them all.
    """
    if not _all_finite(gradients, probed):
        raise GradientNotFinite(
            f"the gradient of the weighted losses of tasks {', '.join(names)} is not finite (NaN or Inf) in the shared "
            "parameters. Nothing was changed. Pass measure=True for one step to learn which task it comes from."
        )


def _all_finite(gradients: Gradients, probed: np.ndarray) -> bool:
    return bool(np.isfinite(probed).all() or finite([gradient for _, gradient in gradients], probed).all())


def _not_finite(name: str, what: str) -> str:
    return (
        f"{what} of task {name!r} is not finite (NaN or Inf). Nothing was changed. Look for a division by zero, a "
        "logarithm of zero, or a learning rate too high for this task."
    )
