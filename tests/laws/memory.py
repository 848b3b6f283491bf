"""Laws about what a method remembers: saving, loading, absent and new tasks, memory that is not its own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from laws.given import Case, Subject, after, drawn, filled, given, length, reach, run, same_bits, state, step

import detente

NAMES = drawn(4, 6, 0).names


def _story(steps: int = 6) -> list[Case]:
    """Four tasks over some steps; one or two of them are absent now and then."""
    cases = [drawn(4, 6, seed, torch.float32) for seed in range(steps)]
    cases[1] = cases[1].only([NAMES[3], NAMES[0], NAMES[1]])
    cases[4] = cases[4].only([NAMES[1], NAMES[2]])
    return cases


def law_no_parameters(one: Subject) -> None:
    """Nothing of a method goes into the user's optimizer, and nothing of its state asks for gradients."""
    method = one.make()
    run(one, method, _story())
    assert not list(method.parameters()), f"{one.label} has trainable parameters"
    for name, buffer in method.named_buffers():
        assert not buffer.requires_grad and buffer.grad_fn is None, (
            f"{one.label}: buffer {name} carries a graph"
        )
    assert not any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in method.state_dict().values()
    )


def law_stateful_as_declared(one: Subject) -> None:
    """Without state, what went before does not show; with it, it does."""
    fresh, used = one.make(), one.make()
    run(one, used, [drawn(4, 6, seed, torch.float32) for seed in range(12)])  # six epochs, past any warm-up
    probe = drawn(4, 6, 40, torch.float32)
    same = same_bits(step(one, fresh, probe), step(one, used, probe))
    if one.info.stateful:
        assert not same, f"{one.label} declares stateful=True, and twelve steps before changed nothing"
    else:
        assert same, f"{one.label} declares stateful=False, and what went before shows"
        # Beside the names of the tasks it may count its calls: whole numbers, for whoever reads them.
        counts = {name for name, b in used.named_buffers() if b.dim() == 0 and b.dtype == torch.int64}
        kept = {key for key in used.state_dict() if key.rpartition(".")[2] != "_extra_state"}
        assert kept <= counts, f"{one.label} declares stateful=False and has buffers"


def _by_state_dict(one: Subject, method: detente.Method) -> detente.Method:
    fresh = one.make(**({"seed": 77} if "seed" in one.info.options else {}))
    fresh.load_state_dict(copy.deepcopy(method.state_dict()), strict=True)
    return fresh


def _by_file(one: Subject, method: detente.Method) -> detente.Method:
    file = io.BytesIO()
    torch.save({"method": torch.nn.ModuleDict({"balance": method}).state_dict()}, file)
    file.seek(0)
    parent = torch.nn.ModuleDict({"balance": one.make()})
    parent.load_state_dict(torch.load(file, weights_only=True)["method"], strict=True)
    loaded = parent["balance"]
    assert isinstance(loaded, detente.Method)
    return loaded


def _into_a_used_one(one: Subject, method: detente.Method) -> detente.Method:
    used = one.make()
    run(one, used, [drawn(4, 6, seed, torch.float32) for seed in range(50, 53)])
    used.load_state_dict(copy.deepcopy(method.state_dict()), strict=True)
    return used


def _by_pickle(one: Subject, method: detente.Method) -> detente.Method:
    return pickle.loads(pickle.dumps(method))  # type: ignore[no-any-return]


def _by_deepcopy(one: Subject, method: detente.Method) -> detente.Method:
    return copy.deepcopy(method)


def law_save_and_load(one: Subject) -> None:
    """A run that is saved and loaded into a fresh method goes on as if it had not been interrupted, bit for bit."""
    story = _story()
    uninterrupted = run(one, one.make(), story)
    ways: list[Callable[[Subject, detente.Method], detente.Method]] = [
        _by_state_dict,
        _by_file,
        _into_a_used_one,
    ]
    if _importable(one.make()):
        ways.append(_by_pickle)
    ways.append(_by_deepcopy)
    for way in ways:
        for stop in (1, 3):
            method = one.make()
            run(one, method, story[:stop])
            resumed = way(one, method)
            assert same_bits(state(resumed), state(method)), f"{one.label} {way.__name__}: another state"
            rest = run(one, resumed, story[stop:], start=stop)
            assert same_bits(rest, uninterrupted[stop:]), f"{one.label} {way.__name__} after step {stop}"
            # The original neither followed nor was disturbed.
            rest = run(one, method, story[stop:], start=stop)
            assert same_bits(rest, uninterrupted[stop:]), f"{one.label} {way.__name__}: copies share memory"
    before = one.make()
    fresh = one.make()
    fresh.load_state_dict(copy.deepcopy(before.state_dict()), strict=True)
    assert same_bits(run(one, fresh, story), uninterrupted), f"{one.label}: saved before the first step"
    sized = one.make()
    sized.bind(NAMES)
    for name, _ in sized.named_buffers():
        cut = copy.deepcopy(method.state_dict())
        cut.pop(name)
        with pytest.raises(RuntimeError, match="Missing key"):
            one.make().load_state_dict(cut, strict=True)


def _importable(method: detente.Method) -> bool:
    return all("<locals>" not in type(module).__qualname__ for module in method.modules())


def law_memory_belongs_to_its_owner(one: Subject) -> None:
    """The engine reuses its memory and the caller may change what was returned: neither shows in the next step."""
    story = _story()
    expected = [copy.deepcopy(outcome) for outcome in run(one, one.make(), story)]
    method = one.make()
    for count, (now, wanted) in enumerate(zip(story, expected, strict=True), start=1):
        lent = replace(now, jacobian=now.jacobian.clone(), activations=now.activations.clone())
        gradients = given(one, lent)
        outcome = filled(method.combine(gradients), gradients, lent)
        assert same_bits(outcome, wanted), (
            f"{one.label} holds on to memory that is not its own (step {count})"
        )
        after(one, method, now, count)
        _overwrite(gradients)
        lent.jacobian.fill_(torch.nan)
        lent.activations.fill_(torch.nan)
        for value in (outcome.weights, outcome.transform, outcome.direction, outcome.block_weights):
            if value is not None:
                value.fill_(torch.nan)


def _overwrite(gradients: detente.TaskGradients) -> None:
    for array in (gradients.losses, gradients.gramian, gradients.block_gramians):
        if array is not None:
            array.fill(float("nan"))
    for further in gradients.extra:
        _overwrite(further)


def law_absent_tasks_keep_their_state(one: Subject) -> None:
    """Steps, or an epoch, without some tasks stay finite and leave their rows of every buffer as they were."""
    method = one.make()
    run(one, method, [drawn(4, 6, seed) for seed in range(4)])
    rows = [row for row, name in enumerate(NAMES) if name not in (NAMES[1], NAMES[3])]
    before = _rows(method, rows)
    present = drawn(4, 6, 9).only([NAMES[3], NAMES[1]])
    outcomes = run(one, method, [present, present], start=4)
    assert method.tasks == NAMES, f"{one.label} forgot absent tasks"
    assert same_bits(_rows(method, rows), before), f"{one.label} changed the state of absent tasks"
    direction = outcomes[0].direction
    assert direction is not None and direction.isfinite().all()
    if not one.info.stateful:
        alone = step(one, one.make(), present)
        assert alone.direction is not None
        assert length(direction - alone.direction) <= 1e-9 * reach(alone, present), (
            f"{one.label}: absent tasks show"
        )


def _rows(method: detente.Method, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    assert method.tasks is not None
    count = len(method.tasks)
    per_task = {name: b for name, b in method.named_buffers() if b.dim() > 0 and len(b) == count}
    return {
        name: b[rows][:, rows].clone() if b.dim() > 1 and b.shape[1] == count else b[rows].clone()
        for name, b in per_task.items()
    }


def law_absent_in_the_first_step(one: Subject) -> None:
    """Tasks named beforehand may be absent from the first step, and what follows is finite."""
    method = one.make()
    method.bind(NAMES)
    assert method.tasks == NAMES
    for outcome in run(one, method, [drawn(4, 6, 1).only([NAMES[2]]), drawn(4, 6, 2)]):
        assert outcome.direction is not None and outcome.direction.isfinite().all()


def law_new_task(one: Subject) -> None:
    """A name that appears later joins; the state of the others stays, and saving still works."""
    method = one.make()
    story = [drawn(5, 6, seed, torch.float32) for seed in range(5)]
    names = story[0].names
    run(one, method, [now.only(names[:3]) for now in story[:2]])
    rows = list(range(3))
    before = _rows(method, rows)
    method.bind(names)
    assert method.tasks == names
    assert same_bits(_rows(method, rows), before), f"{one.label}: a new task changed the others' state"
    for outcome in run(one, copy.deepcopy(method), story[2:], start=2):
        assert outcome.direction is not None and outcome.direction.isfinite().all()
    run(one, method, story[2:3], start=2)
    resumed = _by_state_dict(one, method)
    assert same_bits(run(one, resumed, story[3:], start=3), run(one, method, story[3:], start=3))
