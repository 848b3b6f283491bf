"""Checkpoints that continue bit for bit, and the weights of the epochs that may be tested."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

FILE = "checkpoint.pt"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path``: to a temporary name first, so that a kill never leaves half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read what :func:`save` wrote; nothing in the file is executed.

    Raises:
        CheckpointError: the file is damaged or was not written by detente.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}). Delete the run folder "
            "to start the run again."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a checkpoint. Delete it.")
    return state


def weights_file(folder: Path, epoch: int) -> Path:
    """Where the weights after ``epoch`` (counted from 1) are kept."""
    return folder / f"weights-epoch-{epoch:04d}.pt"


def keep_weights(folder: Path, epochs: Collection[int]) -> None:
    """Delete the weights of epochs (counted from 1) that can no longer be chosen."""
    wanted = {weights_file(folder, epoch) for epoch in epochs}
    for file in folder.glob("weights-epoch-*.pt"):
        if file not in wanted:
            file.unlink()


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's global generators that a network draws from (dropout)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what :func:`random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
