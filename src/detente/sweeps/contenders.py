"""Who is compared, and over which options and learning rates each is tuned."""

from __future__ import annotations

import ast
import itertools
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from detente.methods import create, describe, methods
from detente.sweeps.asked import SweepConfig
from detente.training.config import TrainingConfig

SCALARISATION = "tuned scalarisation"
# A front of more weightings than this is a mistake rather than a wish.
_LARGEST_FRONT = 500

Parse = Callable[[Sequence[str]], TrainingConfig]
"""From further flags of `detente run` to the configuration they give, on top of those of the whole sweep."""


class BadSweep(ValueError):
    """Something that was asked for is wrong; all that was found is listed."""

    def __init__(self, found: Sequence[str]) -> None:
        self.found = tuple(found)
        listed = "".join(f"\n  - {entry}" for entry in found)
        super().__init__(
            f"nothing was started, because of {len(found)} mistake{'s'[: len(found) > 1]}:{listed}"
        )


@dataclass(frozen=True)
class Contender:
    """One line of the comparison.

    Attributes:
        name: in tables and messages.
        config: with everything but the learning rate, the tuned options and the seed.
        space: option of the method to the values that are tried, besides its default.
        kind: a method, the tuned scalarisation, or a task alone.
    """

    name: str
    config: TrainingConfig
    space: Mapping[str, tuple[Any, ...]]
    kind: Literal["method", "scalarisation", "single"] = "method"


@dataclass(frozen=True)
class Point:
    """A learning rate with options of the method, as text for its configuration."""

    learning_rate: float
    options: tuple[str, ...] = ()


def contenders(
    asked: SweepConfig,
    parse: Parse,
    tasks: Sequence[str],
    alone: Callable[[TrainingConfig, str], TrainingConfig] | None,
) -> list[Contender]:
    """Everything that is to be compared: methods, further contenders, the tuned scalarisation, the single tasks.

    Args:
        asked: the sweep.
        parse: gives configurations.
        tasks: of the problem.
        alone: from a configuration to that of one task alone; None if the experiment has none.

    Raises:
        BadSweep: unknown methods, options, spaces or grids; all are listed.
    """
    mistakes: list[str] = []
    found: list[Contender] = []

    def attempt(what: str, make: Callable[[], Contender]) -> None:
        try:
            found.append(make())
        except (ValueError, TypeError, OSError, SyntaxError) as error:
            mistakes.append(f"{what}: {error}")

    names = [name for given in asked.methods for name in (sorted(methods()) if given == "all" else (given,))]
    for name in dict.fromkeys(names):
        attempt(f"--methods {name}", lambda name=name: _method(name, parse, tasks))  # type: ignore[misc]
    for entry in asked.also:
        attempt(f"--also {entry!r}", lambda entry=entry: _further(entry, parse, tasks))  # type: ignore[misc]
    found, wrong = _with_grids(found, asked.grid, tasks)
    mistakes += wrong
    if asked.front:
        attempt(f"--front {asked.front}", lambda: _scalarisation(asked.front, parse, tasks))
    if asked.singles and len(tasks) > 1:
        if alone is None:
            mistakes.append("this experiment cannot train a task alone: add --no-singles.")
        else:
            for task in tasks:
                base = parse(("--method", "uniform", "--gradients", "exact"))
                found.append(Contender(f"single task: {task}", alone(base, task), {}, "single"))
    twice = sorted({one.name for one in found if sum(other.name == one.name for other in found) > 1})
    mistakes += [f"two contenders are called {name!r}; give one of them another label." for name in twice]
    if mistakes:
        raise BadSweep(mistakes)
    return found


def points(
    contender: Contender, lrs: Sequence[float], trials: int, generator: np.random.Generator
) -> list[Point]:
    """The first tuning runs of a contender: as many for each, whatever it has to tune.

    Every learning rate is tried with the method's defaults first. Then come its other options, drawn without
    repetition and spread evenly over the learning rates; where there are none left, learning rates between those
    that were tried.

    Args:
        contender: whose.
        lrs: different learning rates.
        trials: how many points, at least one for each learning rate.
        generator: draws the options.

    Raises:
        ValueError: fewer trials than learning rates.

    Example:
        >>> plain = Contender("uniform", TrainingConfig(), {})
        >>> [point.learning_rate for point in points(plain, (0.01, 0.1), 3, np.random.default_rng(0))]
        [0.01, 0.1, 0.03162]
    """
    rates = sorted(lrs)
    if trials < len(rates):
        raise ValueError(
            f"trials is {trials}, and there are {len(rates)} learning rates: each is tried at least once."
        )
    found = [Point(rate) for rate in rates]
    settings = [
        tuple(f"{name}={_text(value)}" for name, value in zip(contender.space, values, strict=True))
        for values in itertools.product(*contender.space.values())
    ]
    settings = [setting for setting in settings if setting and not _is_default(contender, setting)]
    queues = [list(generator.permutation(len(settings))) for _ in rates]
    while len(found) < trials and any(queues):
        # The learning rates take turns; each goes through the settings in an order of its own.
        for rate, queue in zip(rates, queues, strict=True):
            if queue and len(found) < trials:
                found.append(Point(rate, settings[queue.pop()]))
    while len(found) < trials and len(rates) > 1:
        between = [_rounded(math.sqrt(low * high)) for low, high in itertools.pairwise(rates)]
        new = [rate for rate in between if rate not in rates]
        found += [Point(rate) for rate in new[: trials - len(found)]]
        if not new:
            break
        rates = sorted({*rates, *new})
    return found


def beyond(best: Point, tried: Sequence[Point]) -> Point | None:
    """The next learning rate where the best one is the lowest or the highest that was tried; None where it is neither.

    The step is that between the two learning rates at that edge, and the options are those of the best.

    Example:
        >>> beyond(Point(0.1), [Point(0.01), Point(0.1)])
        Point(learning_rate=1.0, options=())
    """
    rates = sorted({point.learning_rate for point in tried})
    if len(rates) < 2 or best.learning_rate not in (rates[0], rates[-1]):
        return None
    inner = rates[1] if best.learning_rate == rates[0] else rates[-2]
    return Point(_rounded(best.learning_rate**2 / inner), best.options)


def lattice(tasks: int, parts: int) -> list[tuple[float, ...]]:
    """All weightings of the tasks that are multiples of 1/parts, none zero, with sum one.

    Raises:
        ValueError: there are none, or more than a front can use.

    Example:
        >>> lattice(2, 4)
        [(0.25, 0.75), (0.5, 0.5), (0.75, 0.25)]
    """
    if parts < tasks:
        raise ValueError(
            f"with {tasks} tasks the front needs at least {tasks} parts, since no weight is zero."
        )
    count = math.comb(parts - 1, tasks - 1)
    if count > _LARGEST_FRONT:
        raise ValueError(
            f"a front of {parts} parts has {count} weightings of {tasks} tasks; ask for fewer parts "
            f"(at most {_LARGEST_FRONT} weightings)."
        )
    cuts = itertools.combinations(range(1, parts), tasks - 1)
    return [tuple((b - a) / parts for a, b in itertools.pairwise((0, *cut, parts))) for cut in cuts]


def configured(contender: Contender, point: Point, **others: Any) -> TrainingConfig:
    """The configuration of a run."""
    given = [entry for entry in contender.config.option if entry.partition("=")[0] not in contender.space]
    return replace(
        contender.config, learning_rate=point.learning_rate, option=(*given, *point.options), **others
    )


def weighted(point: Point, weights: Sequence[float], tasks: Sequence[str]) -> Point:
    """A point of the front: the tuned learning rate with other weights."""
    return Point(point.learning_rate, (f"weights={_weights(tasks, weights)!r}",))


def _method(asked: str, parse: Parse, tasks: Sequence[str], flags: Sequence[str] = ()) -> Contender:
    # A file's name may hold an @; a space never does.
    name, at, space = asked.rpartition("@")
    if not at:
        name, space = asked, ""
    info = describe(create(name, tasks=tasks))
    if space:
        if space not in info.spaces:
            known = ", ".join(sorted(info.spaces)) or "no space: it looks at losses only"
            raise ValueError(f"{info.name} cannot be solved on {space!r}; it runs on {known}.")
        flags = (*flags, "--gradients", space)
    config = parse(("--method", name, *flags))
    create(name, tasks=tasks, **config.method_options())
    shown = info.name
    if info.takes_gradients:
        if config.gradients not in info.spaces:
            raise ValueError(
                f"{info.name} cannot be solved on {config.gradients!r}; add @{min(info.spaces)}."
            )
        shown = f"{info.name} ({config.gradients})"
    fixed = config.method_options()
    declared = {
        key: option.search for key, option in info.options.items() if option.search and key not in fixed
    }
    return Contender(shown, config, declared)


def _further(entry: str, parse: Parse, tasks: Sequence[str]) -> Contender:
    label, colon, flags = entry.partition(":")
    if not colon or not label.strip() or not flags.strip():
        raise ValueError("give it as 'LABEL: FLAGS', such as 'mao: --optimizer mao'.")
    config = parse(shlex.split(flags))
    info = describe(create(config.method, tasks=tasks, **config.method_options()))
    fixed = config.method_options()
    # What replaces the method (an optimizer with moments of every task) has none of its options to tune.
    declared = {
        key: option.search for key, option in info.options.items() if option.search and key not in fixed
    }
    return Contender(label.strip(), config, declared)


def _scalarisation(parts: int, parse: Parse, tasks: Sequence[str]) -> Contender:
    values = tuple(_weights(tasks, weights) for weights in lattice(len(tasks), parts))
    return Contender(SCALARISATION, parse(("--method", "static")), {"weights": values}, "scalarisation")


def _weights(tasks: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    return dict(zip(tasks, (_rounded(weight) for weight in weights), strict=True))


def _with_grids(
    found: list[Contender], grids: Sequence[str], tasks: Sequence[str]
) -> tuple[list[Contender], list[str]]:
    """The contenders with the values that the user names for their options; and what is wrong with these."""
    mistakes: list[str] = []
    for entry in grids:
        target, equals, listed = entry.partition("=")
        method, dot, option = target.rpartition(".")
        if not equals or not dot or not listed:
            mistakes.append(f"--grid {entry}: give it as METHOD.OPTION=VALUE,VALUE.")
            continue
        values = _values(listed)
        mine = [one for one in found if describe(create(one.config.method)).name == method]
        if not mine:
            mistakes.append(f"--grid {entry}: method {method!r} is not among the contenders.")
            continue
        for value in values:
            try:
                create(mine[0].config.method, tasks=tasks, **{option: value})
            except (ValueError, TypeError) as error:
                mistakes.append(f"--grid {entry}: {error}")
                break
        else:
            found = [
                replace(one, space={**one.space, option: values}) if one in mine else one for one in found
            ]
    return found, mistakes


def _values(listed: str) -> tuple[Any, ...]:
    """Numbers, mappings and sequences as Python values, everything else as text."""
    try:
        found = ast.literal_eval(f"({listed},)")
    except (ValueError, SyntaxError):
        found = tuple(_value(entry) for entry in listed.split(","))
    return tuple(found)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _is_default(contender: Contender, setting: Sequence[str]) -> bool:
    options = describe(create(contender.config.method)).options
    pairs = [entry.partition("=")[::2] for entry in setting]
    return all(_text(options[name].default) == value for name, value in pairs)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _rounded(value: float) -> float:
    """To four digits, so that folders and tables show what was used."""
    return float(f"{value:.4g}")
