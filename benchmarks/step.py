"""One step of `detente.backward` beside a plain summed backward, a hand-written loop and TorchJD.

The hand-written loop is the least an exact method can cost: the forward pass, then for every task one
`torch.autograd.grad` through its head and the trunk. It combines nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch

import detente
from benchmarks._networks import Case, lenet, resnet
from benchmarks._timing import interleaved, ratios

FEATURES_LIMIT = 1.05
EXACT_LIMIT = 1.05


def _runs(case: Case, peers: bool) -> dict[str, Callable[[], object]]:
    exact, features = detente.create("mgda"), detente.create("mgda")

    def plain() -> None:
        _, losses = case.forward()
        torch.stack(losses).sum().backward()
        case.clear()

    def on_features() -> None:
        z, losses = case.forward()
        detente.backward(losses, features, features=z)
        case.clear()

    def on_parameters() -> None:
        _, losses = case.forward()
        detente.backward(losses, exact)
        case.clear()

    def by_hand() -> None:
        _, losses = case.forward()
        for task, loss in enumerate(losses):
            keep = task < case.tasks - 1
            torch.autograd.grad(loss, [*case.shared, *case.own[task]], retain_graph=keep)

    runs: dict[str, Callable[[], object]] = {
        "plain": plain,
        "features": on_features,
        "exact": on_parameters,
        "by hand": by_hand,
    }
    if peers:
        from torchjd.aggregation import MGDA
        from torchjd.autojac import jac_to_grad, mtl_backward

        aggregator = MGDA()

        def torchjd() -> None:
            z, losses = case.forward()
            mtl_backward(losses, features=z, parallel_chunk_size=1)
            jac_to_grad(case.shared, aggregator)
            case.clear()

        runs["TorchJD"] = torchjd
    return runs


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """One row per network: medians (and ranges) of ratios of runs taken in turns, the costly ones fewer times."""
    cases = [(lenet(), 150, 150), (resnet(3), 21, 15), (resnet(40), 15, 3)]
    for case, rounds, costly_rounds in cases[:1] if quick else cases:
        runs = _runs(case, peers=_has_torchjd())
        plain = {"plain": runs["plain"], "features": runs.pop("features")}
        cheap, costly = interleaved(plain, rounds), interleaved(runs, costly_rounds)
        row: dict[str, object] = {
            "network": case.name,
            "T": case.tasks,
            "plain s": sorted(cheap["plain"])[rounds // 2],
            "features / plain": ratios(cheap, "features", "plain"),
        }
        for name, base in (
            ("exact", "plain"),
            ("exact", "by hand"),
            ("TorchJD", "plain"),
            ("exact", "TorchJD"),
        ):
            if name in costly and base in costly:
                row[f"{name} / {base}"] = ratios(costly, name, base)
        yield row


def _has_torchjd() -> bool:
    try:
        import torchjd  # noqa: F401
    except ImportError:
        print("TorchJD is not installed: its columns are left out", file=sys.stderr)
        return False
    return True


def main() -> None:
    """Print the table and whether the promised ratios hold."""
    promised = {"features / plain": FEATURES_LIMIT, "exact / by hand": EXACT_LIMIT}
    for row in rows():
        print(f"{row['network']}, T = {row['T']}: plain step {row['plain s']:.4f} s")
        for name, value in row.items():
            if isinstance(value, tuple):
                median, low, high = value
                limit = promised.get(name)
                verdict = (
                    ""
                    if limit is None
                    else f"  promised <= {limit}: {'kept' if median <= limit else 'NOT KEPT'}"
                )
                print(f"  {name:20} {median:7.3f}  ({low:.3f} to {high:.3f}){verdict}")
