"""A method saved and loaded in the middle of a run, with tasks that are absent now and then."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import detente
from detente.methods.wrappers import EarlyTerminationWarning

SAID = "goes on from a saved state, and task 'b' is absent from its first batch.*shared="
MAKERS: dict[str, Callable[[], detente.Method]] = {
    "inexact-mgda": lambda: detente.create("inexact-mgda", epsilon=5.0, epoch_steps=2),
    "adaptive-mgda": lambda: detente.create("adaptive-mgda", scale=0.5, epoch_steps=2),
    "smooth": lambda: detente.wrap("smooth", detente.create("mgda")),
    "dwa": lambda: detente.create("dwa"),
}
each = pytest.mark.parametrize("make", list(MAKERS.values()), ids=list(MAKERS))


class Run:
    """A model, a method and an optimizer; every batch is drawn by its number."""

    def __init__(self, make: Callable[[], detente.Method], named: bool) -> None:
        self.make, self.named = make, named
        self.start()

    def start(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.ModuleDict({"trunk": nn.Linear(3, 4), "a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
        self.method = self.make()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def reload(self) -> None:
        file, things = io.BytesIO(), ("model", "method", "optimizer")
        torch.save([getattr(self, thing).state_dict() for thing in things], file)
        self.start()
        file.seek(0)
        for thing, state in zip(things, torch.load(file), strict=True):
            getattr(self, thing).load_state_dict(state)

    def losses(self, number: int, names: str) -> dict[str, torch.Tensor]:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
        self.z = self.model["trunk"](x)
        return {name: (self.model[name](self.z) - 1).square().mean() for name in names}

    def step(self, number: int, names: str, **where: Any) -> tuple[Any, ...]:
        if self.named:
            where = {"shared": self.model["trunk"]}
        losses = self.losses(number, names)
        if where.pop("features", False):
            where = {"features": self.z}
        with warnings.catch_warnings(category=EarlyTerminationWarning, action="ignore"):
            record = detente.backward(losses, self.method, **where)
        if record.accepted:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return record.status, record.weights, record.losses, record.notes, record.space

    def parameters(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


STORY = ("ab", "ab", "ab", "a", "ab", "b", "ab")


@each
@pytest.mark.parametrize("named", [True, False])
def test_it_goes_on_bit_for_bit(make: Callable[[], detente.Method], named: bool) -> None:
    whole = Run(make, named)
    story = [whole.step(number, names) for number, names in enumerate(STORY)]
    for stop in (2, 3, 4, 5):
        if not named and STORY[stop] != "ab":
            continue
        run = Run(make, named)
        again = [run.step(number, names) for number, names in enumerate(STORY[:stop])]
        run.reload()
        again += [run.step(number + stop, names) for number, names in enumerate(STORY[stop:])]
        assert again == story and torch.equal(run.parameters(), whole.parameters()), stop


@each
def test_a_first_batch_that_does_not_tell_what_is_shared_is_an_error(
    make: Callable[[], detente.Method],
) -> None:
    run = Run(make, named=False)
    for number in range(3):
        run.step(number, "ab")
    run.reload()
    before = copy.deepcopy(run.method.state_dict())
    for _ in range(2):  # again and again, until it is met
        with pytest.raises(ValueError, match=SAID):
            run.step(3, "a")
    for key, value in run.method.named_buffers():
        assert torch.equal(value, before[key])
    if "features" in detente.methods().get(run.method.declares.name, run.method.declares).spaces:
        with pytest.raises(ValueError, match=SAID):
            run.step(3, "a", features=True)
    # Named in one step, it may still be left to be found in the next.
    run.step(3, "a", shared=run.model["trunk"])
    with pytest.raises(ValueError, match=SAID):
        run.step(4, "a")
    run.step(4, "ab")
    run.step(5, "b")
    assert "no shared parameters" not in str(run.step(6, "a"))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda method: pickle.loads(pickle.dumps(method))])
def test_copies_forget_what_is_shared_as_well(way: Callable[[detente.Method], detente.Method]) -> None:
    run = Run(lambda: detente.create("mgda"), named=False)
    run.step(0, "ab")
    original, run.method = run.method, way(run.method)
    run.method = way(run.method)  # nor does a copy of the copy know
    with pytest.raises(ValueError, match=SAID):
        run.step(1, "a")
    run.step(1, "ab")
    run.step(2, "a")
    run.method = original
    run.step(3, "a")


def test_loading_into_a_method_in_use_keeps_what_it_found_of_this_model() -> None:
    run = Run(lambda: detente.create("adaptive-mgda", epoch_steps=2), named=False)
    run.step(0, "ab")
    run.method.load_state_dict(copy.deepcopy(run.method.state_dict()))
    run.step(1, "a")
    saved, method = copy.deepcopy(run.method.state_dict()), run.method
    run.start()  # another model
    run.method = method
    run.method.load_state_dict(saved)
    with pytest.raises(ValueError, match=SAID):
        run.step(2, "a")
    run.step(2, "ab")


def test_tasks_named_beforehand_may_be_absent_at_first_also_after_a_failed_step() -> None:
    run = Run(lambda: detente.create("dwa", tasks=["a", "b"]), named=False)
    bad = {"a": run.losses(0, "a")["a"] * float("inf")}
    with pytest.raises(ValueError, match="'a'"):
        detente.backward(bad, run.method)
    broken = (
        run.losses(0, "a")["a"].sqrt() * 0 + (run.z.sum() * 0).sqrt()
    )  # a loss of 0 with a gradient of NaN
    with pytest.raises(ValueError, match="'a'"):
        detente.backward({"a": broken}, run.method)
    run.step(0, "a")
    run.step(1, "ab")


def test_a_state_that_knew_no_tasks_asks_for_none() -> None:
    run = Run(lambda: detente.create("mgda"), named=False)
    run.reload()
    run.step(0, "a")
    assert run.method.tasks is None  # one task shares nothing, so the method was not asked


def test_where_nothing_is_shared_one_batch_of_all_tasks_tells_so() -> None:
    weights = {name: torch.ones(2, requires_grad=True) for name in "ab"}
    saved, method = detente.create("dwa"), detente.create("dwa")
    detente.backward({name: weight.sum() for name, weight in weights.items()}, saved)
    method.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match=SAID):
        detente.backward({"a": weights["a"].sum()}, method)
    detente.backward({name: weight.sum() for name, weight in weights.items()}, method)
    detente.backward({"a": weights["a"].sum()}, method)
