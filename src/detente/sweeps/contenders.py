"""Who is compared, and over which options and learning rates each is tuned."""

from __future__ import annotations

import ast
import itertools
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from detente.methods import create, describe, methods
from detente.sweeps.asked import SweepConfig
from detente.training.config import TrainingConfig

SCALARISATION = "tuned scalarisation"
# A front of more weightings than this is a mistake rather than a wish.
_LARGEST_FRONT = 500
# Flags of `detente run` that the sweep sets itself; a further contender may name its method and options.
DECIDED = ("--method", "--option", "--learning-rate", "--seed", "--test", "--no-test", "--devices")
_DECIDED_FURTHER = (*DECIDED[2:], "--data-dir")

Parse = Callable[[Sequence[str]], TrainingConfig]
"""From further flags of `detente run` to the configuration they give, on top of those of the whole sweep; ValueError
where they are not understood."""


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
    losses: Sequence[str] | None = None,
) -> tuple[list[Contender], list[str]]:
    """Everything that is to be compared, and what is wrong with what was asked for.

    Args:
        asked: the sweep.
        parse: gives configurations.
        tasks: of the problem.
        alone: from a configuration to that of one task alone; None if the experiment has none.
        losses: what the method sees, if that is not one loss for each task.

    Returns:
        Methods, further contenders, the tuned scalarisation, the single tasks; and unknown methods, options, spaces
        or grids, one sentence each.
    """
    names = tuple(losses or tasks)
    mistakes: list[str] = []
    found: list[Contender] = []

    def attempt(what: str, make: Callable[[], Contender]) -> None:
        try:
            found.append(make())
        except (ValueError, TypeError, OSError, SyntaxError, LookupError) as error:
            mistakes.append(f"{what}: {error}")

    given = [name for one in asked.methods for name in (sorted(methods()) if one == "all" else (one,))]
    for name in dict.fromkeys(given):
        attempt(f"--methods {name}", partial(_method, name, parse, names))
    for entry in asked.also:
        attempt(f"--also {entry!r}", partial(_further, entry, parse, names))
    found, wrong = _with_grids(found, asked.grid, names, (*asked.methods, *asked.also))
    mistakes += wrong
    if asked.front > 0:
        attempt(f"--front {asked.front}", partial(_scalarisation, asked.front, parse, tasks, names))
    if asked.singles and len(tasks) > 1:
        if alone is None:
            mistakes.append("this experiment cannot train a task alone: add --no-singles.")
        else:
            for task in tasks:
                attempt(f"single task {task}", partial(_single, task, parse, alone))
    twice = sorted({one.name for one in found if sum(other.name == one.name for other in found) > 1})
    mistakes += [f"two contenders are called {name!r}; give one of them another label." for name in twice]
    return found, mistakes


def decided(flags: Sequence[str], names: Sequence[str] = DECIDED) -> list[str]:
    """Those of these flags that are not the user's to give, because the sweep sets them.

    Example:
        >>> decided(("--epochs", "3", "--learning_rate=0.1"))
        ['--learning-rate']
    """
    given = [flag.partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")]
    return [flag for flag in dict.fromkeys(given) if flag in names]


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
            f"--trials is {trials}, and there are {len(rates)} learning rates: each is tried at least once."
        )
    found = [Point(rate) for rate in rates]
    settings = _settings(contender)
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


def beyond(best: Point, tried: Sequence[Point], lrs: Sequence[float]) -> Point | None:
    """The next learning rate where the best one is the lowest or the highest that was tried; None where it is neither.

    The step is that between the two learning rates at this end of the grid, the same for every contender; the options
    are those of the best.

    Example:
        >>> beyond(Point(0.1), [Point(0.01), Point(0.03162), Point(0.1)], (0.01, 0.1))
        Point(learning_rate=1.0, options=())
    """
    tested = [point.learning_rate for point in tried]
    grid = sorted(lrs)
    if len(grid) < 2 or best.learning_rate not in (min(tested), max(tested)):
        return None
    factor = grid[0] / grid[1] if best.learning_rate == min(tested) else grid[-1] / grid[-2]
    return Point(_rounded(best.learning_rate * factor), best.options)


def lattice(tasks: int, parts: int) -> list[tuple[float, ...]]:
    """Every way to share a whole among the tasks in multiples of 1/parts, none zero.

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


def weighted(point: Point, shares: Sequence[float], tasks: Sequence[str]) -> Point:
    """A point of the front: the tuned learning rate with other weights.

    Example:
        >>> weighted(Point(0.1), (0.25, 0.75), ("left", "right")).options
        ("weights={'left': 0.5, 'right': 1.5}",)
    """
    weights = _weights(tasks, shares)
    return Point(point.learning_rate, () if _are_equal(weights) else (f"weights={weights!r}",))


def _method(asked: str, parse: Parse, tasks: Sequence[str]) -> Contender:
    # A file's name may hold an @; a space never does.
    name, at, space = asked.rpartition("@")
    flags: tuple[str, ...] = ()
    if not at:
        name, space = asked, ""
    info = describe(create(name, tasks=tasks))
    if space:
        if not info.takes_gradients:
            raise ValueError(f"{info.name} looks at losses only: leave out @{space}.")
        if space not in info.spaces:
            known = ", ".join(sorted(info.spaces))
            raise ValueError(f"{info.name} cannot be solved on {space!r}; it runs on {known}.")
        flags = ("--gradients", space)
    config = parse(("--method", name, *flags))
    shown = info.name
    if info.takes_gradients:
        if config.gradients not in info.spaces:
            raise ValueError(
                f"{info.name} cannot be solved on {config.gradients!r}; add @{min(info.spaces)}."
            )
        shown = f"{info.name} ({config.gradients})"
    return Contender(shown, config, _declared(info, config))


def _further(entry: str, parse: Parse, tasks: Sequence[str]) -> Contender:
    label, colon, text = entry.partition(":")
    if not colon or not label.strip() or not text.strip():
        raise ValueError("give it as 'LABEL: FLAGS', such as 'mao: --optimizer mao'.")
    flags = shlex.split(text)
    refused = decided(flags, _DECIDED_FURTHER)
    if refused:
        raise ValueError(f"{', '.join(refused)} is decided by the sweep, and equal for all.")
    config = parse(flags)
    info = describe(create(config.method, tasks=tasks, **config.method_options()))
    return Contender(label.strip(), config, _declared(info, config))


def _declared(info: Any, config: TrainingConfig) -> dict[str, tuple[Any, ...]]:
    """The options of a method that are tuned: those with a search grid, unless they are given."""
    fixed = config.method_options()
    return {
        key: tuple(option.search)
        for key, option in info.options.items()
        if option.search and key not in fixed
    }


def _scalarisation(parts: int, parse: Parse, tasks: Sequence[str], losses: Sequence[str]) -> Contender:
    if tuple(tasks) != tuple(losses):
        raise ValueError("this problem has other losses than tasks; a front needs one loss for each task.")
    # The weights have the sum of those of a sum of losses, so that learning rates mean the same.
    values = [_weights(tasks, shares) for shares in lattice(len(tasks), parts)]
    values = [weights for weights in values if not _are_equal(weights)]
    space = {"weights": tuple(values)} if values else {}
    return Contender(SCALARISATION, parse(("--method", "static")), space, "scalarisation")


def _single(task: str, parse: Parse, alone: Callable[[TrainingConfig, str], TrainingConfig]) -> Contender:
    base = parse(("--method", "uniform"))
    return Contender(f"single task: {task}", alone(base, task), {}, "single")


def _weights(tasks: Sequence[str], shares: Sequence[float]) -> dict[str, float]:
    return {task: _rounded(len(tasks) * share) for task, share in zip(tasks, shares, strict=True)}


def _are_equal(weights: Mapping[str, float]) -> bool:
    return len(set(weights.values())) == 1


def _with_grids(
    found: list[Contender], grids: Sequence[str], tasks: Sequence[str], wanted: Sequence[str]
) -> tuple[list[Contender], list[str]]:
    """The contenders with the values that the user names for their options; and what is wrong with these.

    A grid for a contender that was wanted and could not be made is no further mistake.
    """
    mistakes: list[str] = []
    targets: set[str] = set()
    for entry in grids:
        target, equals, listed = entry.partition("=")
        method, dot, option = target.rpartition(".")
        if not equals or not dot or not listed:
            mistakes.append(f"--grid {entry}: give it as METHOD.OPTION=VALUE,VALUE.")
            continue
        values = _values(listed)
        mine = [one for one in found if describe(create(one.config.method)).name == method]
        free = [one for one in mine if option not in one.config.method_options()]
        if not mine and not any(method in one or one == "all" for one in wanted):
            mistakes.append(f"--grid {entry}: method {method!r} is not among the contenders.")
        if mine and not free:
            mistakes.append(f"--grid {entry}: {option} is given already for {mine[0].name}.")
        if target in targets:
            mistakes.append(f"--grid {entry}: there are two grids of {target}.")
        targets.add(target)
        right = True
        for value in values:
            if sum(repr(value) == repr(other) for other in values) > 1:
                mistakes.append(f"--grid {entry}: {value!r} is there twice.")
                right = False
                break
            try:
                if free:
                    create(free[0].config.method, tasks=tasks, **{option: value})
            except (ValueError, TypeError) as error:
                mistakes.append(f"--grid {entry}: {error}")
                right = False
                break
        if right:
            found = [
                replace(one, space={**one.space, option: values}) if one in free else one for one in found
            ]
    return found, mistakes


def _settings(contender: Contender) -> list[tuple[str, ...]]:
    """Every combination of values of the tuned options but that of the defaults."""
    if not contender.space:
        return []
    options = describe(create(contender.config.method)).options
    defaults = tuple(options[name].default for name in contender.space)
    return [
        tuple(f"{name}={_text(value)}" for name, value in zip(contender.space, values, strict=True))
        for values in itertools.product(*contender.space.values())
        if values != defaults
    ]


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


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _rounded(value: float) -> float:
    """To four digits, so that folders and tables show what was used."""
    return float(f"{value:.4g}")
