"""The cost model by hand, and docs/scaling.md beside it. tests/distributed/test_cost_model.py has real processes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))  # benchmarks/ is beside the tests, not installed

import detente
from benchmarks._at_scale import LARGE, MIDDLING, cost, memory_of, tables
from benchmarks._cost_model import Message, Network, Sizes, buckets_of, held, messages, seconds_of, sent, work
from benchmarks.ranks import line_through

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_scaling_tables", ROOT / "scripts" / "make_scaling_tables.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_tables_of_the_code(script: ModuleType) -> None:
    page = script.PAGE.read_text("utf-8")
    made = script.filled(page, {name: script.table(rows) for name, rows in tables().items()})
    assert made == page, "run `python scripts/make_scaling_tables.py`"


def test_a_table_without_a_place_is_an_error(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="0 places for 'lost'"):
        script.filled("<!-- made: found -->\n<!-- end -->", {"lost": ""})


def test_seconds_around_a_ring_and_down_a_tree() -> None:
    ring = Network(latency=1.0, bandwidth=10.0, trees=False)
    # Four ranks, 100 bytes: 2 x 3 hops, 2 x 3/4 of the bytes; half of both; 3 parts of 100 bytes; 2 levels.
    assert seconds_of(Message("all-reduce", 100, ""), 4, ring) == 6 + 15
    assert seconds_of(Message("reduce-scatter", 100, ""), 4, ring) == 3 + 7.5
    assert seconds_of(Message("all-gather", 100, ""), 4, ring) == 3 + 30
    assert seconds_of(Message("broadcast", 100, ""), 4, ring) == 2 + 20
    # 1 024 ranks: ten levels up and down instead of 2 046 hops, for a short message.
    trees = Network(latency=1.0, bandwidth=10.0)
    assert seconds_of(Message("all-reduce", 10, ""), 1024, trees) == 20 + 2
    assert seconds_of(Message("all-reduce", 10**9, ""), 1024, trees) == pytest.approx(
        2046 + 2e8 * 1023 / 1024
    )


def test_bytes_work_and_memory_by_hand() -> None:
    """Ten columns on three ranks: parts of four, rows of twelve."""
    sizes = Sizes(tasks=2, shared=10, own=3, ranks=3, tensors=5, features=(7,), layer=4, buckets=(4, 6))
    info, whole = detente.methods()["mgda"], detente.methods()["graddrop"]
    # Announced 5 doubles, two scattered rows, 4 + 5 + 4 doubles, 2 weights, a part, 3 own entries.
    handed = [message.bytes for message in messages(info, "exact", sizes)]
    assert handed == [40, 48, 48, 104, 16, 16, 12]
    assert sent(messages(info, "exact", sizes), 3) == pytest.approx(
        2 * 40 + 2 / 3 * 96 + 4 / 3 * 104 + 2 * 16 + 2 * 16 + 4 / 3 * 12
    )
    assert messages(info, "exact", Sizes(tasks=2, shared=10, own=3)) == []
    # One forward, two backwards of the trunk, one of the heads, each parameter used five times.
    done = work(info, "exact", sizes, uses=5)
    assert done.network == 2 * 5 * 13 + 4 * 5 * (2 * 10 + 3)
    assert done.products == 2 * 4 * 2**2 and done.combination == 2 * 4 * 2
    assert work(info, "exact", sizes, uses=5, memory="low").network == 2 * 5 * 13 + 4 * 5 * (3 * 10 + 2 * 3)
    # Two parts of rows, a row, then the direction's part, the whole of it, own entries beside their sum.
    assert held(info, "exact", sizes) == 4 * (2 * 4 + 12 + 4 + 10 + 6)
    assert held(whole, "exact", sizes) == 4 * (2 * 10 + 10 + 6)


def test_rows_in_buckets_by_hand() -> None:
    """Parameters of 3, 1, 6, 2, 4 and 1 entries: as many together as are no more than 6."""
    assert buckets_of([3, 1, 6, 2, 4, 1]) == (4, 6, 6, 1)
    sizes = Sizes(tasks=2, shared=10, own=3, ranks=3, tensors=5, shared_tensors=4, buckets=(4, 6))
    found = messages(detente.methods()["mgda"], "exact", sizes, memory="low")
    # Announced, 4 places, 2 rows of 3 parts of 2 columns twice, 4 + 5 + 4 doubles, weights, gradients, own ones.
    assert [message.bytes for message in found] == [40, 32, 48, 48, 104, 16, 40, 12]
    # Two rows of the larger bucket and this rank's part of them; then gradients beside their sum.
    assert held(detente.methods()["mgda"], "exact", sizes, memory="low") == 4 * (12 + 4 + 20 + 3)


def test_parameters_of_a_resnet() -> None:
    """23 508 032 and 159, as torchvision's ResNet-50 without its last layer has."""
    assert (MIDDLING.shared, MIDDLING.shared_tensors) == (23_508_032, 159)


def test_what_a_method_keeps_is_found_by_running_it() -> None:
    """moco: running means, of which the new ones are made beside the old, and a direction."""
    assert memory_of("moco")[0] == 1.0
    assert memory_of("mgda") == (0.0, (0.0, 1.0))


def test_a_line_is_found_again() -> None:
    line = line_through([10, 1000, 100_000], [2.0 + 3.0 * length for length in (10, 1000, 100_000)])
    assert (line.start, line.per_byte, line.off) == pytest.approx((2.0, 3.0, 0.0), abs=1e-6)


def test_what_the_page_concludes() -> None:
    """Features as cheap as the summed losses, exact between half a sum and a backward for each task, at any size."""
    plain = cost("uniform", "none", LARGE)
    assert cost("mgda", "features", LARGE).seconds == pytest.approx(plain.seconds, rel=0.02)
    ratio = cost("mgda", "exact", LARGE).seconds / plain.seconds
    assert (LARGE.tasks + 1) / 2 < ratio < (1 + 2 * LARGE.tasks) / 3
    assert cost("db-mtl", "exact", LARGE).held > 80e9 > cost("mgda", "exact", LARGE).held
