"""What the base class does for an author: names, sizes, growth, saving, and undoing what failed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import detente
from detente import Combination, Declaration, Method, TaskGradients
from detente.methods.base import check_names, positional
from detente.methods.options import check_preference, one_of, weight_by_name


class Ledger(Method):
    """Counts in buffers of every kind; fails when told to."""

    declares = Declaration(name="ledger", source="these tests", stateful=True)

    def __init__(self, *, preference: Any = None, seed: int = 0) -> None:
        super().__init__(preference=preference, seed=seed)
        self.register_buffer(
            "rate", torch.tensor([0.5, 0.25])
        )  # as long as two tasks, and none of their business
        self.fail = False

    def allocate(self, tasks: int) -> None:
        self.register_buffer("count", torch.zeros(tasks, dtype=torch.int64))
        self.register_buffer("pairs", torch.eye(tasks))
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))
        self.register_buffer("rows", None)
        self.register_buffer("columns", torch.zeros(tasks, 0))

    def solve(self, gradients: TaskGradients) -> Combination:
        assert self.tasks is not None and self.generator is not None
        torch.rand(1, generator=self.generator)
        if self.fail:
            raise ValueError("told to fail")
        if self.rows is None:
            self.rows = torch.ones(len(self.tasks), 3)
            self.columns = torch.ones(len(self.tasks), 3)
        self.count[self.positions(gradients.names)] += 1
        self.total += 1
        return Combination(weights=torch.ones(gradients.tasks, dtype=torch.float64))


def step(method: Method, *names: str) -> Combination:
    return method.combine(TaskGradients(names=names, losses=np.ones(len(names)), space="none"))


def test_counts_follow_names() -> None:
    method = Ledger()
    step(method, "a", "b")
    step(method, "b")
    step(method, "b", "a")
    assert method.tasks == ("a", "b") and method.count.tolist() == [2, 3]
    assert method.positions(["b", "a"]).tolist() == [1, 0]


def test_a_new_task_grows_every_kind_of_buffer() -> None:
    method = Ledger()
    step(method, "a", "b")
    method.pairs[0, 1] = 7.0
    step(method, "c", "b")
    assert method.tasks == ("a", "b", "c")
    assert method.count.tolist() == [1, 2, 1] and method.total.item() == 2
    assert method.pairs.tolist() == [[1, 7, 0], [0, 1, 0], [0, 0, 1]]
    assert method.rows.tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert method.columns.shape == (3, 3)
    assert method.rate.tolist() == [0.5, 0.25]


@pytest.mark.parametrize("names", [("a", "b"), ("a",), ("a", "b", "c", "d")])
def test_a_failed_step_leaves_everything_as_it_was(names: tuple[str, ...]) -> None:
    method = Ledger()
    step(method, "a", "b")
    before, shapes = copy.deepcopy(method.state_dict()), [b.shape for b in method.buffers()]
    method.fail = True
    with pytest.raises(ValueError, match="told to fail"):
        step(method, *names)
    after = method.state_dict()
    assert method.tasks == ("a", "b") and [b.shape for b in method.buffers()] == shapes
    assert torch.equal(after["_extra_state"]["generator"], before["_extra_state"]["generator"])
    assert all(torch.equal(after[key], before[key]) for key in before if key != "_extra_state")


def test_a_failed_first_step_leaves_a_fresh_method() -> None:
    method = Ledger()
    method.fail = True
    with pytest.raises(ValueError, match="told to fail"):
        step(method, "a", "b")
    assert method.tasks is None and list(method.state_dict()) == ["rate", "_extra_state"]
    method.fail = False
    step(method, "x", "y", "z")
    assert method.count.tolist() == [1, 1, 1]


def test_a_fresh_method_takes_names_and_sizes_from_what_it_loads() -> None:
    method = Ledger()
    step(method, "a", "b")
    step(method, "a", "b", "c")
    fresh = Ledger(seed=9)
    fresh.load_state_dict(method.state_dict(), strict=True)
    assert fresh.tasks == ("a", "b", "c") and fresh.rows.tolist() == method.rows.tolist()
    assert fresh.generator is not None and method.generator is not None
    assert torch.equal(fresh.generator.get_state(), method.generator.get_state())
    step(fresh, "c")
    assert fresh.count.tolist() == [2, 2, 2] and method.count.tolist() == [2, 2, 1]


def test_the_state_of_other_tasks_is_not_loaded() -> None:
    method = Ledger()
    step(method, "a", "b")
    other = Ledger()
    step(other, "a", "z")
    with pytest.raises(ValueError, match="saved state is for tasks a, b, this method was created for a, z"):
        other.load_state_dict(method.state_dict())
    assert other.tasks == ("a", "z") and other.count.tolist() == [1, 1]


def test_the_order_of_the_saved_tasks_counts() -> None:
    method = Ledger()
    step(method, "a", "b")
    step(method, "b")
    other = Ledger()
    other.bind(["b", "a"])
    other.load_state_dict(method.state_dict())
    assert other.tasks == ("a", "b") and other.count.tolist() == [1, 2]


@pytest.mark.parametrize(
    "make",
    [
        lambda names, by: detente.create("inexact-mgda", tasks=names, epsilon=by),
        lambda names, by: detente.create("static", tasks=names, weights=by),
        lambda names, by: detente.create("aligned-mtl", tasks=names, preference=by),
        lambda names, by: detente.wrap("smooth", detente.create("aligned-mtl", tasks=names, preference=by)),
    ],
)
def test_numbers_by_position_do_not_change_their_owner_in_loading(make: Any) -> None:
    rows, losses = torch.tensor([[1.0, 0.0], [0.0, 9.0]]), {"x": 1.0, "y": 1.0}
    saved = make(["x", "y"], [0.1, 5.0])
    detente.combine(saved, rows, losses)
    other = make(["y", "x"], [5.0, 0.1])
    tasks, before = other.tasks, detente.combine(copy.deepcopy(other), rows, losses)
    with pytest.raises(
        ValueError, match=r"order x, y, this method in the order y, x, and the .* Give it by name"
    ):
        other.load_state_dict(saved.state_dict())
    assert other.tasks == tasks
    after = detente.combine(other, rows, losses)
    assert torch.equal(before.direction, after.direction)  # type: ignore[arg-type]
    for again in (make(["x", "y"], [0.1, 5.0]), make(["y", "x"], {"y": 5.0, "x": 0.1})):
        again.load_state_dict(saved.state_dict())
        outcome, expected = (detente.combine(one, rows, losses) for one in (again, copy.deepcopy(saved)))
        assert torch.equal(outcome.direction, expected.direction)  # type: ignore[arg-type]


def test_state_follows_a_model_to_its_device_and_keeps_its_dtype() -> None:
    method = Ledger()
    step(method, "a", "b")
    before = {name: buffer.clone() for name, buffer in method.named_buffers()}
    model = torch.nn.ModuleDict({"method": method, "layer": torch.nn.Linear(2, 2)})
    model.half().to(torch.bfloat16)
    for name, buffer in method.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    model.to("meta")
    assert all(
        buffer.is_meta and buffer.dtype == before[name].dtype for name, buffer in method.named_buffers()
    )


def test_pickle_and_deepcopy_take_the_generator_along() -> None:
    method = Ledger(seed=3)
    step(method, "a")
    for twin in (pickle.loads(pickle.dumps(method)), copy.deepcopy(method)):
        step(twin, "a")
        assert twin.generator.get_state().tolist() != method.generator.get_state().tolist()  # type: ignore[union-attr]
        assert twin.count.tolist() == [2] and method.count.tolist() == [1]
    a, b = copy.deepcopy(method), copy.deepcopy(method)
    assert torch.rand(3, generator=a.generator).tolist() == torch.rand(3, generator=b.generator).tolist()


def test_memory_of_the_engine_is_not_copied() -> None:
    method = detente.create("mgda")
    weight = torch.ones(3, requires_grad=True)
    detente.backward([weight.sum(), weight.square().sum()], method)
    assert len(pickle.dumps(method)) < 10_000
    assert "workspace" not in copy.deepcopy(method).__dict__


@pytest.mark.parametrize("seed", [1.0, "1", True, None.__class__, float("nan")])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(ValueError, match="option seed"):
        Ledger(seed=seed)
    Ledger(seed=np.int64(5))
    Ledger(seed=-1)


# ---- preference


class Leaning(Method):
    """Weights are the preference."""

    declares = Declaration(name="leaning", source="these tests")

    def __init__(self, *, preference: Any = None) -> None:
        super().__init__(preference=preference)

    def solve(self, gradients: TaskGradients) -> Combination:
        found = self.preference(gradients.names)
        return Combination(weights=torch.from_numpy(np.ones(gradients.tasks) if found is None else found))


def leaning(preference: Any, *names: str) -> list[float]:
    method = Leaning(preference=preference)
    found = step(method, *names).weights
    assert found is not None
    return found.tolist()


def test_preference_by_position_is_by_the_names_first_seen() -> None:
    assert leaning([1.0, 3.0], "a", "b") == [1.0, 3.0]
    method = Leaning(preference=[1.0, 3.0])
    step(method, "a", "b")
    found = step(method, "b", "a").weights
    assert found is not None and found.tolist() == [3.0, 1.0]


def test_preference_of_the_tasks_present_keeps_the_sum() -> None:
    whole = {"a": 1.0, "b": 2.0, "c": 5.0}
    assert leaning(whole, "c", "a", "b") == [5.0, 1.0, 2.0]
    assert leaning(whole, "a", "b") == pytest.approx([8 / 3, 16 / 3])
    assert leaning(whole, "c") == [8.0]
    assert leaning(None, "a", "b") == [1.0, 1.0]


def test_preference_zero_for_all_present_tasks_is_an_error() -> None:
    method = Leaning(preference={"a": 1.0, "b": 0.0})
    with pytest.raises(ValueError, match=r"every task present in this step \(b\) has preference 0"):
        step(method, "b")
    assert method.tasks is None
    assert step(method, "b", "a").accepted


def test_preference_names_a_new_task_or_the_step_is_rejected() -> None:
    method = Leaning(preference={"a": 1.0, "b": 1.0})
    step(method, "a")
    assert method.tasks == ("a", "b")
    with pytest.raises(ValueError, match="no value for task 'c'"):
        step(method, "a", "c")
    assert method.tasks == ("a", "b")


# ---- names


def test_named_and_unnamed_losses_do_not_mix() -> None:
    method = Leaning()
    step(method, "a", "b", "c")
    with pytest.raises(ValueError, match="tasks a, b, c and was given 2 unnamed losses"):
        step(method, "0", "1")
    unnamed = Leaning()
    unnamed.bind(positional(2))
    with pytest.raises(ValueError, match="2 unnamed tasks and was given losses named seg, depth"):
        step(unnamed, "seg", "depth")
    with pytest.raises(ValueError, match="2 unnamed losses became 3"):
        step(unnamed, "0", "1", "2")
    assert method.tasks == ("a", "b", "c") and unnamed.tasks == ("0", "1")


def test_a_method_may_be_asked_before_it_knows_anything() -> None:
    method = Leaning(preference=[1.0, 2.0])
    assert method.tasks is None and list(method.parameters()) == []
    found = method.preference(["x", "y"])
    assert found is not None and found.tolist() == [1.0, 2.0]
    method.end_epoch()
    method.after_step({"x": 1.0})


# ---- helpers


def test_helpers() -> None:
    assert check_names(["a", "b"]) == ("a", "b") and positional(0) == ()
    with pytest.raises(ValueError, match="'b' occurs twice"):
        check_names(["a", "b", "c", "b"])
    assert check_preference("p", None) is None
    assert check_preference("p", {"a": 1}) == {"a": 1.0}
    assert check_preference("p", np.array([0, 2])) == (0.0, 2.0)
    with pytest.raises(ValueError, match="p is zero for every task"):
        check_preference("p", [])
    values = weight_by_name([1, 2], ("x", "y"), "p")
    assert values is not None and values.dtype == np.float64
    with pytest.raises(ValueError, match="p names the unknown task 'z'"):
        weight_by_name({"x": 1, "z": 1}, ("x",), "p")
    with pytest.raises(ValueError, match="option form is 3; choose one of 'a', 'b'"):
        one_of("form", 3, ("a", "b"))  # type: ignore[arg-type]
