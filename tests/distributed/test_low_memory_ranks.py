"""memory="low" on several processes: the Gramian of the whole batch, also where the ranks' graphs differ."""

from __future__ import annotations

from typing import Any

import pytest
from low import FITTING, ORDERS, TASKS, everything
from processes import in_processes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks report."""
    return in_processes(everything, 2, tmp_path_factory.mktemp("low"))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("case", ORDERS)
def test_graphs_that_differ_between_the_ranks(found: list[dict[str, Any]], case: str, scaled: bool) -> None:
    for rank in found:
        assert rank["crossing"][case, scaled] == []


@pytest.mark.parametrize("scale", ["native", "sum"])
def test_every_method_that_gives_weights(found: list[dict[str, Any]], scale: str) -> None:
    assert len(FITTING) > 10
    for rank in found:
        assert rank["methods"][scale] == []


def test_what_is_sent_and_held(found: list[dict[str, Any]]) -> None:
    """Eight layers of 16 × 16 and a bias: the rows go in pieces of at most the largest parameter."""
    tasks, tensors, layer = len(TASKS), 16, 16 * 16
    shared, own = 8 * (layer + 16), tasks * 17
    for rank in found:
        calls, sent, held, pieces = rank["cost"]
        assert held == tasks * layer * 3 // 2  # T rows of one weight, and this rank's half of their sum
        # Announcement, order of the parameters, pieces, one sum with the Gramian, weights, P, H.
        assert calls == 1 + 1 + pieces + 1 + 1 + 1 + 1
        told = (3 + tasks) + tensors + (2 * tasks + tensors + 2 * tasks + tasks**2) + tasks
        assert sent == 8 * told + 4 * (tasks * shared + shared + own)
