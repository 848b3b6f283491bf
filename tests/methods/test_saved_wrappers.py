"""States of wrapped methods that earlier code saved go on as they did then.

``PYTHONPATH=src python tests/methods/test_saved_wrappers.py`` wrote ``saved_wrappers.json`` at commit b464403, before
the wrappers became one package; the file stays as it was written.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import detente

FILE = Path(__file__).with_name("saved_wrappers.json")
NAMES = ("a", "b", "c")
BEFORE, AFTER = 5, 4

MADE: dict[str, Callable[[], detente.Method]] = {
    "inexact-mgda": lambda: detente.create("inexact-mgda", epsilon={"a": 1.0, "b": 0.9, "c": 0.8}),
    "inexact-mgda by steps": lambda: detente.create(
        "inexact-mgda", epsilon=1.2, epoch_steps=4, solver="frank-wolfe", normalize="l2"
    ),
    "adaptive-mgda": lambda: detente.create("adaptive-mgda", scale=0.5, epoch_steps=3),
    "adaptive-mgda running": lambda: detente.create("adaptive-mgda", statistics="running", decay=0.9),
    "adaptive(cagrad)": lambda: detente.wrap("adaptive", detente.create("cagrad"), epoch_steps=2, scale=1.0),
    "inexact(pcgrad)": lambda: detente.wrap("inexact", detente.create("pcgrad"), epsilon=[1.5, 0.5, 1.0]),
    "every(smooth(mgda))": lambda: detente.wrap(
        "every", detente.wrap("smooth", detente.create("mgda"), beta=0.5), k=3
    ),
    "smooth(every(aligned-mtl))": lambda: detente.wrap(
        "smooth", detente.wrap("every", detente.create("aligned-mtl"), k=2)
    ),
    "normalize(moco)": lambda: detente.wrap("normalize", detente.create("moco"), by="loss+"),
    "per-block(smooth(mgda))": lambda: detente.wrap(
        "per-block", detente.wrap("smooth", detente.create("mgda"))
    ),
    "per-block(inexact-mgda)": lambda: detente.wrap(
        "per-block", detente.create("inexact-mgda", epsilon=0.7, epoch_steps=3), by="tensor"
    ),
    "smooth(per-block(mgda))": lambda: detente.wrap(
        "smooth", detente.wrap("per-block", detente.create("mgda"), by="tensor")
    ),
}


def step(method: detente.Method, number: int) -> list[Any]:
    """Make step ``number`` on drawn gradients in three blocks; weights or the direction, and the status."""
    random = np.random.default_rng(number)
    sizes = (4, 2, 3)
    jacobian = random.normal(size=(3, sum(sizes))) + 0.4
    blocks = np.stack([part @ part.T for part in np.split(jacobian, np.cumsum(sizes)[:-1], axis=1)])
    result = method.combine(
        detente.TaskGradients(
            names=NAMES,
            losses=random.uniform(0.5, 2.0, size=3),
            gramian=blocks.sum(axis=0),
            jacobian=torch.from_numpy(jacobian),
            block_gramians=blocks,
            block_names=("w", "b", "v"),
            block_sizes=sizes,
            block_layers=(0, 0, 1),
            space="exact",
        )
    )
    (found,) = (one for one in (result.weights, result.block_weights, result.direction) if one is not None)
    return [found.tolist(), result.status]


def written(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict in plain numbers."""
    return {
        key: [str(value.dtype).removeprefix("torch."), list(value.shape), value.reshape(-1).tolist()]
        if isinstance(value, torch.Tensor)
        else {
            name: written({name: entry})[name] if isinstance(entry, torch.Tensor) else entry
            for name, entry in value.items()
        }
        for key, value in state.items()
    }


def read(state: dict[str, Any]) -> dict[str, Any]:
    """The state dict that :func:`written` was given."""
    return {
        key: {
            name: read({name: entry})[name] if name == "generator" else entry for name, entry in value.items()
        }
        if isinstance(value, dict)
        else torch.tensor(value[2], dtype=getattr(torch, value[0])).reshape(value[1])
        for key, value in state.items()
    }


@pytest.mark.parametrize("name", MADE)
def test_a_state_saved_by_earlier_code_goes_on(name: str) -> None:
    saved = json.loads(FILE.read_text(encoding="utf-8"))[name]
    method = MADE[name]()
    method.load_state_dict(read(saved["state"]))  # strict: no key missing, none left over
    assert written(method.state_dict()) == saved["state"]
    for number, (weights, status) in enumerate(saved["after"], start=BEFORE):
        with warnings.catch_warnings(action="ignore"):
            found, told = step(method, number)
        assert told == status
        np.testing.assert_allclose(found, weights, rtol=1e-12)


def test_every_wrapper_and_preset_is_among_them() -> None:
    everything = " ".join(MADE)
    presets = [name for name in detente.methods() if detente.create(name)._modules]
    assert set(presets) == {"inexact-mgda", "adaptive-mgda"}
    assert all(name in everything for name in (*detente.wrappers.registered(), *presets))


if __name__ == "__main__":
    saved = {}
    for name, make in MADE.items():
        method = make()
        for number in range(BEFORE):
            step(method, number)
        state = written(method.state_dict())
        saved[name] = {"state": state, "after": [step(method, BEFORE + number) for number in range(AFTER)]}
    FILE.write_text(json.dumps(saved) + "\n", encoding="utf-8")
