"""What rounded cells allow, by a search over the cells and on a published table."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detente.metrics import delta_m
from detente.statistics import Printed, Range, delta_m_range

# Senushkin et al. (2023), table 2 (NYUv2, three tasks), as printed; the last two columns are the published Δm, over
# metrics and over tasks.
LAYOUT = {
    "segmentation": ["miou", "pixel_accuracy"],
    "depth": ["absolute", "relative"],
    "normals": ["mean", "median", "within_11", "within_22", "within_30"],
}
HIGHER = {
    **dict.fromkeys(("miou", "pixel_accuracy", "within_11", "within_22", "within_30"), True),
    **dict.fromkeys(("absolute", "relative", "mean", "median"), False),
}
SINGLE = "38.30 63.76 0.68 0.28 25.01 19.21 30.14 57.20 69.15"
ROWS = {
    "Uniform": ("39.29 65.33 0.5493 0.2263 28.15 23.96 22.09 47.50 61.08", "5.46", "-1.07"),
    "CAGrad": ("39.79 65.49 0.55 0.23 26.31 21.58 25.61 52.36 65.58", "0.29", "-4.18"),
    "Aligned-MTL": ("40.82 66.33 0.53 0.22 25.19 19.71 28.88 56.23 68.54", "-4.93", "-8.40"),
}


def cells(row: str) -> dict[str, dict[str, Printed]]:
    texts = iter(row.split())
    return {
        task: {metric: Printed.read(next(texts)) for metric in metrics} for task, metrics in LAYOUT.items()
    }


@pytest.mark.parametrize("name", ROWS)
def test_a_published_delta_m_follows_from_its_row(name):
    row, by_metric, by_task = ROWS[name]
    for per, published in (("metric", by_metric), ("task", by_task)):
        allowed = delta_m_range(cells(row), cells(SINGLE), HIGHER, per=per)
        assert allowed.overlaps(Printed.read(published).range)
        assert 0.1 < allowed.high - allowed.low < 3.0
        # The other column's number does not follow from it.
        other = by_task if per == "metric" else by_metric
        assert not allowed.overlaps(Printed.read(other).range)


def test_a_cell_by_hand():
    # 0.55 / 0.68: from 0.545 / 0.685 to 0.555 / 0.675.
    results, baselines = {"d": {"e": Printed(0.55, 2)}}, {"d": {"e": Printed(0.68, 2)}}
    found = delta_m_range(results, baselines, {"e": False})
    assert (found.low, found.high) == pytest.approx(
        ((0.545 / 0.685 - 1) * 100, (0.555 / 0.675 - 1) * 100), rel=1e-12
    )
    turned = delta_m_range(results, baselines, {"e": True})
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), rel=1e-12)


CELL = st.tuples(st.integers(-300, 900), st.integers(60, 900), st.booleans())


@settings(max_examples=40, deadline=None)
@given(st.lists(CELL, min_size=1, max_size=4), st.sampled_from(["task", "metric"]), st.integers(0, 2**32 - 1))
def test_no_choice_of_digits_leaves_it(columns, per, seed):
    """Negative results too, where Δm rises with the baseline. All corners together reach both ends."""
    results, baselines, higher = {"a": {}, "b": {}}, {"a": {}, "b": {}}, {}
    for place, (value, base, direction) in enumerate(columns):
        task = "b" if place == 1 else "a"
        results[task][f"k{place}"] = Printed(value / 100, 2)
        baselines[task][f"k{place}"] = Printed(base / 10, 1)
        higher[f"k{place}"] = direction
    if not results["b"]:
        del results["b"], baselines["b"]
    found = delta_m_range(results, baselines, higher, per=per)

    def draw(table, pick):
        return {t: {m: pick(cell.range) for m, cell in metrics.items()} for t, metrics in table.items()}

    rng = np.random.default_rng(seed)
    inside = [
        delta_m(
            draw(results, lambda r: rng.uniform(r.low, r.high)),
            draw(baselines, lambda r: rng.uniform(r.low, r.high)),
            higher,
            per=per,
        )
        for _ in range(30)
    ]
    corners = [
        delta_m(
            draw(results, lambda r: rng.choice([r.low, r.high])),
            draw(baselines, lambda r: rng.choice([r.low, r.high])),
            higher,
            per=per,
        )
        for _ in range(300)
    ]
    slack = 1e-9 * (1 + abs(found.low) + abs(found.high))
    assert found.low - slack <= min(inside + corners) and max(inside + corners) <= found.high + slack
    if len(columns) == 1:
        assert (min(corners), max(corners)) == pytest.approx((found.low, found.high))


def test_plain_numbers_are_exact():
    results, baselines = {"d": {"e": 0.55}}, {"d": {"e": 0.68}}
    found = delta_m_range(results, baselines, {"e": False})
    assert found.low == found.high == delta_m(results, baselines, {"e": False})
    ours = delta_m({"d": {"e": 0.5512}}, baselines, {"e": False})
    assert ours in delta_m_range({"d": {"e": Printed.read("0.55")}}, baselines, {"e": False})
    assert ours not in delta_m_range({"d": {"e": Printed.read("0.550")}}, baselines, {"e": False})


def test_cells_as_printed():
    assert Printed.read(" 0.5493 ") == Printed(0.5493, 4)
    assert Printed.read("-1.07").range == Range(-1.075, -1.065)
    assert Printed.read("30").range == Range(29.5, 30.5)
    assert Printed.read("0.30").range == Range(0.295, 0.305)
    assert Printed(1500, -2).range == Range(1450.0, 1550.0)
    assert Printed(np.float64(0.5), 1).range == Range(0.45, 0.55)
    # Ends count, whichever way halves are rounded, and 0.545 is not in binary what 0.54 + 0.005 is.
    assert 0.535 in Printed.read("0.54").range and 0.545 in Printed.read("0.54").range
    assert math.nextafter(0.545, 1) not in Printed.read("0.54").range
    for text in ("", "n/a", "0,54"):
        with pytest.raises(ValueError, match="no number"):
            Printed.read(text)
    for text in ("nan", "inf"):
        with pytest.raises(ValueError, match="no finite number"):
            Printed.read(text)


def test_what_has_no_bound_is_refused():
    with pytest.raises(
        ValueError, match=r"task 'd', metric 'e', printed as 0.0 with 2 decimals, may be zero"
    ):
        delta_m_range({"d": {"e": 1.0}}, {"d": {"e": Printed.read("0.00")}}, {"e": False})
    with pytest.raises(ValueError, match="baselines lack task 'd'"):
        delta_m_range({"d": {"e": 1.0}}, {}, {"e": False})
    with pytest.raises(ValueError, match="higher_is_better lacks metric 'e'"):
        delta_m_range({"d": {"e": 1.0}}, {"d": {"e": 1.0}}, {})
