"""Which epochs are tested: named rules that look at validation data alone.

A rule is a pure function of the history of validation metrics. It names the epochs whose weights must be kept so
far; after the last epoch these are the epochs that are tested (their metrics are averaged).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

History = Sequence[Mapping[str, float]]
"""For each epoch so far, the tasks' main metrics, each signed so that higher is better."""


Baselines = Mapping[str, float]
"""For each task the main metric of a network trained for it alone, signed likewise; empty if not given."""


def mean(history: History, k: int, baselines: Baselines) -> list[int]:
    """The first epoch with the best mean of the tasks' main metrics."""
    return _first_best([sum(values.values()) / len(values) for values in history])


def delta_m(history: History, k: int, baselines: Baselines) -> list[int]:
    """The first epoch with the lowest Δm: the mean relative loss against single-task baselines."""
    return _first_best(
        [
            sum((values[task] - baseline) / abs(baseline) for task, baseline in baselines.items())
            / len(baselines)
            for values in history
        ]
    )


def last(history: History, k: int, baselines: Baselines) -> list[int]:
    """The last epoch."""
    return [len(history) - 1]


def last_k(history: History, k: int, baselines: Baselines) -> list[int]:
    """The last k epochs, whose test metrics are averaged."""
    return list(range(max(0, len(history) - k), len(history)))


def non_dominated(history: History, k: int, baselines: Baselines) -> list[int]:
    """Every epoch that no other dominates; the latest of them is tested (Aygar 2019)."""
    return [
        epoch
        for epoch, values in enumerate(history)
        if not any(_dominates(other, values) for other in history if other is not values)
    ]


RULES: Mapping[str, Callable[[History, int, Baselines], list[int]]] = {
    "mean": mean,
    "delta-m": delta_m,
    "last": last,
    "last-k": last_k,
    "non-dominated": non_dominated,
}


def kept(rule: str, history: History, k: int, baselines: Baselines | None = None) -> list[int]:
    """Positions of the epochs whose weights must be kept, given the history so far.

    An epoch that a rule lets go is never asked for again.

    Example:
        >>> kept("mean", [{"a": 0.1, "b": 0.3}, {"a": 0.4, "b": 0.4}, {"a": 0.2, "b": 0.2}], 1)
        [1]
    """
    return RULES[rule](history, k, baselines or {})


def chosen(rule: str, history: History, k: int, baselines: Baselines | None = None) -> list[int]:
    """Positions of the epochs to test, given the whole history; several are averaged.

    Example:
        >>> chosen("non-dominated", [{"a": 0.1, "b": 0.9}, {"a": 0.4, "b": 0.4}, {"a": 0.2, "b": 0.3}], 1)
        [1]
    """
    epochs = kept(rule, history, k, baselines)
    return epochs[-1:] if rule == "non-dominated" else epochs


def _first_best(values: Sequence[float]) -> list[int]:
    return [max(range(len(values)), key=lambda epoch: (_comparable(values[epoch]), -epoch))]


def _comparable(value: float) -> float:
    return value if value == value else float("-inf")  # a run that diverged is never the best


def _dominates(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    pairs = [(_comparable(one[task]), _comparable(other[task])) for task in one]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
