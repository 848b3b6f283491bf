"""Which examples a step learns from: the order of an epoch, and further batches for methods that compare several."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from detente.records.atomic import plain
from detente.training.config import TrainingConfig
from detente.values import MethodInfo


def further_batches(info: MethodInfo, config: TrainingConfig) -> int:
    """How many batches every step needs besides its own.

    Methods that declare ``batches:k`` need k - 1, unless the configuration lets one batch serve for all.

    Raises:
        ValueError: the method needs some, and the configuration has steps that take none.

    Example:
        >>> from detente.methods import create, describe
        >>> further_batches(describe(create("modo")), TrainingConfig())
        2
        >>> further_batches(describe(create("mgda")), TrainingConfig())
        0
    """
    further = info.batches - 1
    if further == 0 or config.further_batches == "same":
        return 0
    others = {
        f"gradients {config.gradients}": config.gradients == "features",
        f"accumulate {config.accumulate}": config.accumulate > 1,
        f"memory {config.memory}": config.memory == "low",
        f"search {config.search}": config.search != "none",
    }
    for told, asked in others.items():
        if asked:
            raise ValueError(
                f"method {info.name} compares the gradients of {info.batches} independent batches, which {told} does "
                "not go with: leave that out, or let one batch serve for all with further_batches same."
            )
    return further


def absent_options(info: MethodInfo, config: TrainingConfig) -> dict[str, Any]:
    """Name of an option to what it stands for in the record of an earlier version, which did not know it.

    Example:
        >>> from detente.methods import create, describe
        >>> absent_options(describe(create("modo")), TrainingConfig())["further_batches"]
        'same'
    """
    found = dict(plain(asdict(type(config)())))
    # Before there was the option, one batch served for all.
    if info.batches > 1:
        found["further_batches"] = "same"
    return found


def epoch_order(examples: int, seed: int, epoch: int, further: int = 0) -> torch.Tensor:
    """[examples] int64: the order of the training examples in an epoch, a function of its arguments alone.

    Args:
        examples: how many there are.
        seed: of the run.
        epoch: counted from 0.
        further: 0 for the batches of the steps; from 1 on, for each further batch, an order of its own.

    Example:
        >>> epoch_order(5, seed=0, epoch=3).equal(epoch_order(5, seed=0, epoch=3))
        True
    """
    numbers = (seed, epoch, further) if further else (seed, epoch)
    return torch.randperm(examples, generator=torch.Generator().manual_seed(seed_of(*numbers)))


def seed_of(*numbers: int) -> int:
    """A seed that depends on all of these numbers, whole and not negative.

    Example:
        >>> seed_of(0, 1) == seed_of(1, 0)
        False
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
