"""States of wrapped methods that earlier code saved go on as they did then."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import saved_wrappers

SAVED: dict[str, Any] = json.loads(saved_wrappers.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", saved_wrappers.MADE)
def test_a_state_saved_by_earlier_code_goes_on(name: str) -> None:
    saved = SAVED[name]
    method = saved_wrappers.MADE[name]()
    method.load_state_dict(saved_wrappers.read(saved["state"]))  # strict: no key missing, none left over
    assert saved_wrappers.written(method.state_dict()) == saved["state"]
    for number, (weights, status) in enumerate(saved["after"], start=saved_wrappers.BEFORE):
        with warnings.catch_warnings(action="ignore"):
            found, told = saved_wrappers.step(method, number)
        assert told == status
        assert (
            found == pytest.approx(weights, rel=1e-12)
            if not isinstance(weights[0], list)
            else ([pytest.approx(row, rel=1e-12) for row in weights] == found)
        )


def test_every_wrapper_and_preset_is_among_them() -> None:
    import detente

    everything = " ".join(saved_wrappers.MADE)
    presets = [name for name in detente.methods() if detente.create(name)._modules]
    assert set(presets) == {"inexact-mgda", "adaptive-mgda"}
    assert all(name in everything for name in (*detente.wrappers.registered(), *presets))
