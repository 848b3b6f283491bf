"""One guard for each block of parameters: what is stored with an epoch, and which block a warning is about."""

from __future__ import annotations

import warnings

import pytest
import torch

import detente
from detente.methods.wrappers import EarlyTerminationWarning, PerBlock


def test_per_block_tells_what_the_copies_have_to_say_and_which_block_warns() -> None:
    a, b = (torch.ones(1, requires_grad=True) for _ in range(2))

    def epoch(method: PerBlock) -> None:
        for factor in (1.0, 1.0, 4.0):  # the shorter gradient is 2 in a and 1 in b, then 8 and 4
            detente.backward([factor * (2 * a + b), factor * (a * 2 + 4 * b)], method)

    method = PerBlock(detente.create("inexact-mgda", epsilon=4.5), by="tensor")
    assert method.epoch_record() == {"refused_share": None}
    epoch(method)
    with pytest.warns(
        EarlyTerminationWarning, match=r"refused 3 of 3 .* in shared tensor 1 \[1\]: if"
    ) as caught:
        method.end_epoch()
    assert len(caught) == 1
    expected = {
        "refused_share": pytest.approx((2 / 3 + 1) / 2),
        "blocks": [{"refused_share": pytest.approx(2 / 3)}, {"refused_share": 1.0}],
    }
    assert method.epoch_record() == expected
    again = PerBlock(detente.create("inexact-mgda", epsilon=4.5), by="tensor")
    again.load_state_dict(method.state_dict())
    assert again.epoch_record() == expected
    epoch(again)
    with pytest.warns(EarlyTerminationWarning, match="in shared tensor 1"):
        again.end_epoch()
    layers = PerBlock(detente.create("inexact-mgda", epsilon=4.5, epoch_steps=3))
    for _ in range(2):
        detente.backward([2 * a + b, a * 2 + 4 * b], layers)
    with pytest.warns(EarlyTerminationWarning, match=r"in the layer of shared tensor 0 \[1\]"):
        detente.backward([2 * a + b, a * 2 + 4 * b], layers)
    adaptive = PerBlock(detente.create("adaptive-mgda"), by="tensor")
    epoch(adaptive)
    adaptive.end_epoch()
    told = adaptive.epoch_record()
    assert told["refused_share"] == 0 and set(told) == {"refused_share", "blocks"}
    assert [set(block["epsilon_squared"]) for block in told["blocks"]] == [{"0", "1"}] * 2
    assert PerBlock(detente.create("mgda")).epoch_record() == {}


def test_per_block_closes_every_copy_where_the_warning_is_an_error() -> None:
    a, b = (torch.ones(1, requires_grad=True) for _ in range(2))
    method = PerBlock(detente.create("inexact-mgda", epsilon=9.0), by="tensor")
    detente.backward([a + b, a + 2 * b], method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(EarlyTerminationWarning, match="in shared tensor 0"):
            method.end_epoch()
    assert [told["refused_share"] for told in method.epoch_record()["blocks"]] == [1.0, 1.0]
