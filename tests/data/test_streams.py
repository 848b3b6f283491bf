"""The random streams behind the data sets against PCG64 written out in whole numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from detente.data.streams import check_seed, random_integers, random_order

MASK = (1 << 128) - 1
MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645
PINNED_INTEGERS = [9453, 4117, 6641, 6421, 2281, 8880]
PINNED_ORDER = [9, 7, 2, 0, 4, 3, 5, 6, 1, 8]


def pcg64(seed: int, key: tuple[int, ...], count: int) -> list[int]:
    """PCG XSL-RR 128/64 after O'Neill (2014), seeded with four words of a SeedSequence."""
    words = [int(w) for w in np.random.SeedSequence(seed, spawn_key=key).generate_state(4, np.uint64)]
    increment = ((words[2] << 64 | words[3]) << 1 | 1) & MASK
    state = (increment + (words[0] << 64 | words[1])) & MASK
    state = (state * MULTIPLIER + increment) & MASK
    numbers = []
    for _ in range(count):
        state = (state * MULTIPLIER + increment) & MASK
        folded, turn = (state >> 64 ^ state) & (2**64 - 1), state >> 122
        numbers.append((folded >> turn | folded << (-turn & 63)) & (2**64 - 1))
    return numbers


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32, 2**70 + 3])
@pytest.mark.parametrize("below", [1, 2, 5000, 55_000, 2**31])
def test_integers_equal_the_written_out_rule(seed: int, below: int) -> None:
    expected = [(number >> 32) * below >> 32 for number in pcg64(seed, (1, 2), 50)]
    drawn = random_integers(seed, (1, 2), below=below, count=50)
    assert drawn.dtype == np.int64
    assert drawn.tolist() == expected


def test_order_equals_the_written_out_rule() -> None:
    numbers = pcg64(3, (0, 1), 300)
    assert random_order(3, (0, 1), 300).tolist() == sorted(range(300), key=numbers.__getitem__)


def test_values_of_today_are_those_of_tomorrow() -> None:
    assert random_integers(0, (1, 0), below=10_000, count=6).tolist() == PINNED_INTEGERS
    assert random_order(0, (0, 0), 10).tolist() == PINNED_ORDER


def test_integers_are_uniform() -> None:
    counts = Counter(random_integers(7, (), below=10, count=100_000).tolist())
    chi_squared = sum((counts[k] - 10_000) ** 2 / 10_000 for k in range(10))
    assert set(counts) == set(range(10))
    assert chi_squared < 27.9  # 99.9 % quantile for 9 degrees of freedom


def test_keys_and_seeds_give_different_streams() -> None:
    streams = {
        tuple(random_integers(seed, key, below=1000, count=8).tolist())
        for seed in (0, 1, 2**32)
        for key in ((), (0,), (1,), (0, 0), (0, 1), (1, 0))
    }
    assert len(streams) == 18


def test_nothing_is_drawn_from_the_global_generator() -> None:
    np.random.seed(3)  # noqa: NPY002 - the global generator is what this is about
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    random_integers(0, (), below=5, count=5)
    assert np.random.random() == expected  # noqa: NPY002


@pytest.mark.parametrize("seed", [-1, 1.0, "0", None, True, np.bool_(True)])
def test_a_seed_that_is_no_whole_number_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"seed is .*whole number"):
        random_order(seed, (), 3)


def test_numpy_integers_are_seeds() -> None:
    assert check_seed(np.int64(5)) == 5
    assert type(check_seed(np.int64(5))) is int


@pytest.mark.parametrize("below", [0, -3, 2**31 + 1])
def test_an_empty_or_too_wide_range_is_refused(below: int) -> None:
    with pytest.raises(ValueError, match="below is"):
        random_integers(0, (), below=below, count=1)
