"""The first pass of a step and the task gradients it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detente.autograd.measure import Taken, measure_gradients
from detente.autograd.partition import Memory
from detente.autograd.ranks import Ranks
from detente.autograd.reduce import Prepared, Samples, prepare
from detente.autograd.take import take
from detente.autograd.where import Where
from detente.linesearch.closure import Losses
from detente.methods import Method
from detente.step import asks_for_rows


def begin(
    first: Callable[[], tuple[Any, Losses]],
    where: Callable[[Any], Where],
    method: Method,
    memory: Memory,
    ranks: Ranks | None,
    samples: Samples,
    *,
    whole: bool,
) -> tuple[Prepared, Taken, Any, Losses]:
    """Run the closure with a graph, and take every task's gradient.

    Args:
        first: the pass; on several processes its error is announced to the others.
        where: from the representation to where the problem is solved, and who owns what.
        method: what the gradients are for.
        memory: of the search.
        ranks: None on a single process.
        samples: examples behind the losses of this rank.
        whole: on several processes, let every rank have all of the gradients also where the method needs only numbers.

    Returns:
        The tasks, their gradients, and what the closure gave: representation and losses.

    Raises:
        ValueError: as :func:`detente.backward`, or there is nothing to search along.
        RankFailed: another rank raised something.
    """
    features: Any = None
    losses: Losses = {}
    failed: list[Exception] = []
    try:
        features, losses = first()
    except Exception as error:
        failed.append(error)

    def check() -> None:
        if failed:
            raise failed[0]

    solved = where(features)
    ready = prepare(losses, solved, memory, ranks, samples=samples, known=method.tasks, check=check)
    needs = method.needs_now()
    graph = take(
        ready,
        solved,
        memory,
        retain_graph=False,
        mode="fast",
        activations="activations" in needs,
        whole=whole or asks_for_rows(needs),
    )
    if graph is None:
        raise ValueError(
            "no parameter named in shared= requires a gradient, so there is nothing to search along."
        )
    return ready, measure_gradients(ready.names, graph, blocks="blocks" in needs), features, losses
