"""One step of `detente.optim.MAO` beside the least it can cost by hand, with and without a look at the gradients.

By hand: the forward pass, then for every task one `torch.autograd.grad` through its head and the trunk and one update
of `torch.optim.Adam(fused=True)` with moments of its own. These updates move a copy of the parameters: moved in place,
they would spoil the next task's backward. One backward of the sum and one Adam are shown for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks._networks import Case, lenet, resnet
from benchmarks._timing import interleaved, ratios
from detente.optim import MAO

LIMIT = 1.05


def _runs(case: Case) -> dict[str, Callable[[], object]]:
    mao = MAO(case.shared, case.own, lr=1e-5)
    copies = {
        p: torch.nn.Parameter(p.detach().clone())
        for p in (*case.shared, *(p for own in case.own for p in own))
    }
    adams = [
        torch.optim.Adam([copies[p] for p in (*case.shared, *own)], lr=1e-5, fused=True) for own in case.own
    ]
    plain = torch.optim.Adam(copies, lr=1e-5, fused=True)

    def step() -> None:
        _, losses = case.forward()
        mao.step(losses)

    def measured() -> None:
        _, losses = case.forward()
        mao.step(losses, measure=True)

    def by_hand() -> None:
        _, losses = case.forward()
        for task, loss in enumerate(losses):
            wanted = [*case.shared, *case.own[task]]
            found = torch.autograd.grad(loss, wanted, retain_graph=task < case.tasks - 1)
            for parameter, gradient in zip(wanted, found, strict=True):
                copies[parameter].grad = gradient
            del found
            adams[task].step()

    def uniform() -> None:
        _, losses = case.forward()
        torch.stack(losses).sum().backward()
        plain.step()
        case.clear()

    return {"by hand": by_hand, "MAO": step, "MAO measured": measured, "one Adam": uniform}


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """One row per network: medians (and ranges) of ratios of runs taken in turns, what is promised more often."""
    cases = [(lenet(), 150), (resnet(3), 31)]
    for case, rounds in cases[:1] if quick else cases:
        runs = _runs(case)
        pair = interleaved({name: runs[name] for name in ("by hand", "MAO")}, rounds, warmup=2)
        others = interleaved(runs, max(5, rounds // 5))
        yield {
            "network": case.name,
            "T": case.tasks,
            "by hand s": sorted(pair["by hand"])[rounds // 2],
            "MAO / by hand": ratios(pair, "MAO", "by hand"),
            "MAO measured / MAO": ratios(others, "MAO measured", "MAO"),
            "MAO / one Adam": ratios(others, "MAO", "one Adam"),
        }


def main() -> None:
    """Print the table and whether the promised ratio holds."""
    for row in rows():
        print(f"{row['network']}, T = {row['T']}: by hand {row['by hand s']:.4f} s")
        for name, value in row.items():
            if isinstance(value, tuple):
                median, low, high = value
                verdict = ""
                if name == "MAO / by hand":
                    verdict = f"  promised <= {LIMIT}: {'kept' if median <= LIMIT else 'NOT KEPT'}"
                print(f"  {name:20} {median:7.3f}  ({low:.3f} to {high:.3f}){verdict}")
