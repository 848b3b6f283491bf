"""Laws about bad input: the right exception, and nothing changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from laws.given import (
    SPACES,
    Case,
    Subject,
    case,
    drawn,
    given,
    run,
    same_bits,
    state,
    step,
    takes_one_for_each_task,
)

import detente

REJECTS = (ValueError, TypeError)

# A word of the message by which a reader learns what is missing.
SAID = {
    "losses": "losses",
    "gramian": "Gramian",
    "jacobian": "gradients",
    "blocks": "block",
    "activations": "representation",
}


def law_bad_options(one: Subject) -> None:
    """Unknown options, choices that do not exist, numbers that are none."""
    with pytest.raises(REJECTS, match="no_such_option"):
        one.make(no_such_option=1)
    several = takes_one_for_each_task(type(one.make()))
    for name, option in one.info.options.items():
        if name == one.preference:
            continue
        bad: list[Any] = []
        if option.choices:
            bad += ["no such choice", *([None] if None not in option.choices else [])]
        numbers = [
            v for v in (option.default, *option.search) if isinstance(v, (int, float)) and v is not True
        ]
        if numbers and not option.choices:
            bad += [math.nan, "no number", *([] if name in several else [[1.0, 2.0]])]
        for value in bad:
            with pytest.raises(REJECTS):
                one.make(**{name: value})
        for value in (*option.choices, *option.search):
            one.make(**{name: value})


def law_bad_preference(one: Subject) -> None:
    """Negative, zero, not finite, of the wrong length, for a task that does not exist."""
    option = one.preference
    assert option is not None
    for values in (
        [1.0, -0.1, 1.0],
        [0.0, 0.0, 0.0],
        [1.0, math.nan, 1.0],
        [1.0, math.inf, 1.0],
        {"seg": -1.0},
    ):
        with pytest.raises(ValueError, match=option):
            one.make(**{option: values})
    for values in ("abc", [1.0, "x"], 0.5):
        with pytest.raises(REJECTS):
            one.make(**{option: values})
    now = drawn(3, 5, 0)
    _rejected(one, one.make(**{option: [1.0, 2.0]}), lambda m: m.combine(given(one, now)), match=option)
    missing = {"seg": 1.0, "depth": 1.0, "nosuch": 1.0}
    _rejected(one, one.make(**{option: missing}), lambda m: m.combine(given(one, now)), match="normals")
    full = {**dict.fromkeys(now.names, 1.0), "nosuch": 1.0}
    _rejected(one, one.make(**{option: full}), lambda m: m.bind(now.names), match="nosuch")
    method = one.make(**{option: [1.0, 2.0, 3.0]})
    run(one, method, [now])
    _rejected(one, method, lambda m: m.combine(given(one, drawn(4, 5, 1))), match="edges")
    method = one.make(**{option: dict.fromkeys(now.names, 1.0)})
    run(one, method, [now])
    _rejected(one, method, lambda m: m.combine(given(one, drawn(4, 5, 1))), match="edges")


def law_bad_calls_change_nothing(one: Subject) -> None:
    """Whatever is rejected leaves the method as it was: one that never ran, one that knows names, one that does not."""
    good = [drawn(3, 5, seed, torch.float32) for seed in range(3)]
    unnamed = [replace(now, names=("0", "1", "2")) for now in good]
    for story in ([], good, unnamed):
        names = story[0].names if story else good[0].names

        def make(story: list[Any] = story) -> detente.Method:
            method = one.make()
            run(one, method, story)
            return method

        for bad in (math.nan, math.inf):
            rows = good[0].jacobian.clone()
            rows[1, 2] = bad
            losses = dict(zip(names, good[0].losses, strict=True))
            _rejected(one, make(), lambda m, r=rows, x=losses: detente.combine(m, r, x), match=repr(names[1]))
            broken = {**losses, names[2]: bad}
            call = lambda m, x=broken: detente.combine(m, good[0].jacobian, x)  # noqa: E731
            _rejected(one, make(), call, match=repr(names[2]))
        _rejected(one, make(), lambda m: detente.combine(m, good[0].jacobian, [1.0]), match="losses")
        _rejected(one, make(), lambda m: detente.combine(m, good[0].jacobian[0]), match="shape")
        _rejected(one, make(), lambda m: detente.combine(m, good[0].jacobian[:0]), match="shape")
        twice = replace(good[0], names=(names[0], names[1], names[0]))
        _rejected(one, make(), lambda m, now=twice: m.combine(given(one, now)), match="twice")
        empty = detente.TaskGradients(names=(), **_nothing(one))
        _rejected(one, make(), lambda m, gradients=empty: m.combine(gradients))
        for loss in (0.0, -1.0):
            _rejected_or_finite(one, make(), replace(good[0], names=names, losses=np.array([1.0, loss, 1.0])))
        for space in set(SPACES) - one.info.spaces:
            gradients = replace(given(one, good[0]), space=space, names=names)
            _rejected(one, make(), lambda m, g=gradients: m.combine(g), match=space)
        for need in make().needs_now() & set(SAID):
            gradients = replace(given(one, good[0], everything=True, without=need), names=names)
            if need == "activations" and gradients.space != "features":
                continue
            _rejected(one, make(), lambda m, g=gradients: m.combine(g), match=SAID[need])
    more = case(drawn(4, 5, 8).jacobian, names=("0", "1", "2", "3"))
    fewer = case(drawn(2, 5, 8).jacobian, names=("0", "1"))
    method = one.make()
    run(one, method, unnamed)
    for other in (more, fewer):
        _rejected(one, method, lambda m, now=other: m.combine(given(one, now)), match="unnamed")
    _rejected(one, method, lambda m: m.combine(given(one, good[0])), match="unnamed")
    method = one.make()
    run(one, method, good)
    _rejected(one, method, lambda m: m.combine(given(one, unnamed[0])), match="unnamed")


def _nothing(one: Subject) -> dict[str, Any]:
    """Empty values for what the method needs, so that only the missing tasks are at fault."""
    gradients = given(one, drawn(2, 4, 0), everything=True)
    fields = {"losses": gradients.losses, "gramian": gradients.gramian, "jacobian": gradients.jacobian}
    shapes = {"losses": (0,), "gramian": (0, 0), "jacobian": (0, 4)}
    empty = {
        name: value.reshape(-1)[:0].reshape(shapes[name])
        for name, value in fields.items()
        if value is not None
    }
    blocks = gradients.block_gramians
    if blocks is not None:
        empty["block_gramians"] = blocks[:, :0, :0]
    return {**empty, "activations": gradients.activations, "space": gradients.space}


def _rejected(
    one: Subject, method: detente.Method, call: Callable[[detente.Method], Any], match: str | None = None
) -> None:
    before, tasks = state(method), method.tasks
    with pytest.raises(REJECTS, match=match):
        call(method)
    assert method.tasks == tasks, f"{one.label}: a rejected call changed the tasks"
    assert same_bits(state(method), before), f"{one.label}: a rejected call changed the state"


def _rejected_or_finite(one: Subject, method: detente.Method, now: Case) -> None:
    """Losses that some formulas cannot take: the outcome is finite, or the task is named and nothing changed."""
    before = state(method)
    try:
        outcome = step(one, method, now)
    except ValueError as rejected:
        named = repr(now.names[1]) in str(rejected)
        assert named, f"{one.label}: the message does not name the task"
        assert same_bits(state(method), before), f"{one.label}: a rejected loss changed the state"
    else:
        assert outcome.direction is not None and outcome.direction.isfinite().all(), (
            f"{one.label}: loss {now.losses}"
        )


def law_bad_losses_in_after_step(one: Subject) -> None:
    """Losses that are not finite, given after the step, are rejected and change nothing."""
    now = drawn(3, 5, 0)
    method = one.make()
    run(one, method, [now, now])
    method.combine(given(one, now))
    losses = dict(zip(now.names, now.losses.tolist(), strict=True))
    for bad in (math.nan, math.inf):
        broken = {name: torch.tensor(value) for name, value in (losses | {now.names[1]: bad}).items()}
        _rejected(one, method, lambda m, x=broken: m.after_step(x), match=now.names[1])
