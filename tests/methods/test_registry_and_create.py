"""Names to methods: registering, describing, making, and what goes wrong on the way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import detente
from detente import Combination, Declaration, Method, TaskGradients
from detente.methods import UnknownMethod, UnknownOption, describe, info_of
from detente.methods.registry import read_signature
from detente.values import Row


@pytest.fixture(autouse=True)
def _same_methods_afterwards() -> Iterator[None]:
    before = set(detente.methods())
    yield
    for name in set(detente.methods()) - before:
        detente.unregister(name)


def _first(self: Method, gradients: TaskGradients) -> Combination:
    return Combination(weights=torch.eye(gradients.tasks, dtype=torch.float64)[0])


def made(name: str = "made-up", doc: str | None = "Follow the first task.", **body: Any) -> type[Method]:
    """A small method class."""
    declared = Declaration(name=name, source="these tests", **body.pop("declared", {}))
    return type("MadeUp", (Method,), {"__doc__": doc, "declares": declared, "solve": _first, **body})


# ---- the registry


def test_methods_are_listed_by_name_with_what_they_declare() -> None:
    found = detente.methods()
    assert list(found) == sorted(found)
    assert all(name == info.name for name, info in found.items())
    mgda = found["mgda"]
    assert mgda.needs == {"gramian"} and mgda.spaces == {"exact", "features", "layer"}
    assert (mgda.stationary, mgda.homogeneity, mgda.nonconflict, mgda.simplex) == ("hull", 1, True, True)
    assert (mgda.permutation, mgda.native_scale, mgda.stateful) == ("exact", "simplex", False)
    assert mgda.summary.startswith("Multiple-gradient descent") and "Sener" in mgda.source
    assert mgda.takes_gradients and not found["uniform"].takes_gradients


def test_options_and_their_choices_are_read_from_the_signature() -> None:
    options = detente.methods()["mgda"].options
    assert list(options) == ["solver", "normalize"]
    assert options["solver"].default == "exact" and options["solver"].choices == ("exact", "frank-wolfe")
    assert options["normalize"].search == ("none", "l2", "loss", "loss+")
    assert detente.methods()["aligned-mtl"].options["scale"].choices == ("min", "median", "rmse")
    assert detente.methods()["static"].options["weights"].choices == ()


def test_the_default_is_the_first_choice() -> None:
    for info in detente.methods().values():
        for name, option in info.options.items():
            if option.choices:
                assert option.default == option.choices[0], f"{info.name}: {name}"


def test_what_is_listed_cannot_be_changed() -> None:
    info = detente.methods()["mgda"]
    with pytest.raises(AttributeError):
        info.summary = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        info.options["solver"] = info.options["normalize"]  # type: ignore[index]
    detente.methods().clear()
    assert "mgda" in detente.methods()


def test_register_makes_known_and_unregister_forgets() -> None:
    cls = made()
    assert detente.register(cls) is cls
    assert detente.methods()["made-up"].summary == "Follow the first task."
    method = detente.create("made-up")
    assert type(method) is cls and info_of(method) == detente.methods()["made-up"]
    detente.unregister("made-up")
    assert "made-up" not in detente.methods()
    with pytest.raises(UnknownMethod, match="made-up"):
        detente.unregister("made-up")
    assert info_of(method).name == "made-up"  # an instance still says what it is


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match=r"'mgda' is already registered by detente\.methods\.mgda\.MGDA"):
        detente.register(made("mgda"))
    assert type(detente.create("mgda")).__name__ == "MGDA"


def test_the_same_class_may_be_registered_again() -> None:
    """A notebook runs a cell twice, a file is loaded twice: the later definition counts."""
    detente.register(made())
    again = detente.register(made(doc="Another text."))
    assert type(detente.create("made-up")) is again
    assert detente.methods()["made-up"].summary == "Another text."


@pytest.mark.parametrize("doc", [None, "", "   \n"])
def test_a_docstring_is_required(doc: str | None) -> None:
    with pytest.raises(TypeError, match="MadeUp has no docstring"):
        detente.register(made(doc=doc))


def test_a_docstring_is_not_inherited() -> None:
    parent = made()
    child = type("Child", (parent,), {"declares": Declaration(name="child", source="here")})
    with pytest.raises(TypeError, match="Child has no docstring"):
        detente.register(child)


def test_a_declaration_is_required() -> None:
    class Silent(Method):
        """Declares nothing."""

        solve = _first

    with pytest.raises(TypeError, match="Silent has no `declares`"):
        detente.register(Silent)


def test_every_option_needs_a_default() -> None:
    class Demanding(Method):
        """Wants a number."""

        declares = Declaration(name="demanding", source="here")
        solve = _first

        def __init__(self, *, rate: float) -> None:
            super().__init__()

    with pytest.raises(TypeError, match="'rate' of Demanding has no default"):
        detente.register(Demanding)


def test_options_of_a_class_without_constructor_are_none() -> None:
    """`preference` and `seed` of the base are for authors to pass on; without that they would do nothing."""
    detente.register(made())
    assert dict(detente.methods()["made-up"].options) == {}
    for option in ({"seed": 3}, {"preference": [1, 2]}):
        with pytest.raises(UnknownOption, match="made-up has no option"):
            detente.create("made-up", **option)


def test_choices_and_search_values_of_ones_own() -> None:
    class Choosy(Method):
        """Has options of several kinds."""

        declares = Declaration(name="choosy", source="here", search={"rate": (0.1, 1.0)})
        solve = _first

        def __init__(
            self, *, form: Literal["a", "b"] = "a", rate: float = 0.5, size: int | None = None
        ) -> None:
            super().__init__()

    options = describe(Choosy).options
    assert options["form"].choices == ("a", "b") and options["form"].search == ()
    assert options["rate"].choices == () and options["rate"].search == (0.1, 1.0)
    assert options["size"].default is None


def test_a_search_over_no_option_is_a_slip() -> None:
    with pytest.raises(TypeError, match="search over 'rat'"):
        describe(made(declared={"search": {"rat": (1, 2)}}))


@pytest.mark.parametrize(
    "declared, message",
    [
        ({"needs": frozenset({"gramain"})}, "'gramain'"),
        ({"needs": frozenset({"batches:1"})}, "'batches:1'"),
        ({"needs": frozenset({"batches"})}, "'batches'"),
        ({"needs": frozenset({"batches:k"})}, "'batches:k'"),
        ({"spaces": frozenset({"feature"})}, "'feature'"),
        ({"spaces": frozenset()}, "no space"),
    ],
)
def test_a_declaration_that_nothing_could_meet_is_a_slip(declared: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(declared=declared)
    made(declared={"needs": frozenset({"batches:2", "losses", "epoch", "after_step", "blocks"})})


# ---- create


@pytest.mark.parametrize(
    "name, close",
    [("mgdaa", "mgda"), ("MGDA", None), ("alligned-mtl", "aligned-mtl"), ("unifrom", "uniform")],
)
def test_unknown_methods_bring_suggestions(name: str, close: str | None) -> None:
    with pytest.raises(UnknownMethod) as caught:
        detente.create(name)
    message = str(caught.value)
    assert repr(name) in message and "aligned-mtl, " in message
    if close is not None:
        assert f"did you mean {close!r}?" in message
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, LookupError)


def test_unknown_options_are_named_with_the_known_ones() -> None:
    with pytest.raises(UnknownOption, match="mgda has no option 'solvr'; it has solver, normalize"):
        detente.create("mgda", solvr="exact")
    assert issubclass(UnknownOption, TypeError) and issubclass(UnknownOption, ValueError)


def test_wrong_choices_name_the_right_ones() -> None:
    with pytest.raises(ValueError, match="option solver is 'exakt'; choose one of 'exact', 'frank-wolfe'"):
        detente.create("mgda", solver="exakt")


def test_tasks_by_name_by_number_or_on_first_use() -> None:
    assert detente.create("mgda", tasks=["seg", "depth"]).tasks == ("seg", "depth")
    assert detente.create("mgda", tasks=3).tasks == ("0", "1", "2")
    method = detente.create("mgda")
    assert method.tasks is None
    detente.combine(method, torch.eye(2), {"seg": 1.0, "depth": 2.0})
    assert method.tasks == ("seg", "depth")


@pytest.mark.parametrize(
    "tasks, error, message",
    [
        ([], ValueError, "no tasks"),
        (0, ValueError, "no tasks"),
        (["a", "b", "a"], ValueError, "'a' occurs twice"),
        ("ab", TypeError, "give a list of names"),
    ],
)
def test_tasks_that_make_no_sense(tasks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        detente.create("mgda", tasks=tasks)


def test_tasks_and_preference_have_to_fit() -> None:
    with pytest.raises(ValueError, match="unknown task 'typo'"):
        detente.create("aligned-mtl", tasks=["a", "b"], preference={"a": 1, "b": 1, "typo": 1})
    with pytest.raises(ValueError, match="no value for task 'b'"):
        detente.create("aligned-mtl", tasks=["a", "b"], preference={"a": 1})
    with pytest.raises(ValueError, match="3 values for 2 tasks"):
        detente.create("aligned-mtl", tasks=["a", "b"], preference=[1, 1, 1])


# ---- a method of one's own from a file

SOURCE = '''
from __future__ import annotations

from typing import Literal

import torch

import detente


class Halves(detente.Method):
    """Half of every task."""

    declares = detente.Declaration(name="halves", source="a user's file", homogeneity=1)

    def __init__(self, *, form: Literal["half", "third"] = "half", **kwargs: int) -> None:
        super().__init__()
        self.part = 1 / 2 if form == "half" else 1 / 3

    def solve(self, gradients: detente.TaskGradients) -> detente.Combination:
        return detente.Combination(weights=torch.full((gradients.tasks,), self.part, dtype=torch.float64))


class Other:
    pass
'''


@pytest.fixture
def users_file(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "users_method.py"
    file.write_text(SOURCE, encoding="utf-8")
    before = set(sys.modules)
    yield file
    for name in set(sys.modules) - before:
        if "users_method" in name:
            del sys.modules[name]


def test_a_method_from_a_file(users_file: Path) -> None:
    method = detente.create(f"{users_file}:Halves", tasks=["a", "b"], form="third")
    outcome = detente.combine(method, 3 * torch.eye(2), {"a": 1.0, "b": 1.0})
    assert outcome.direction is not None and outcome.direction.tolist() == pytest.approx([1.0, 1.0])
    info = info_of(method)
    assert info.name == "halves" and info.options["form"].choices == ("half", "third")
    assert list(info.options) == ["form"]
    assert "halves" not in detente.methods()  # it did not ask to be registered
    with pytest.raises(UnknownOption, match="halves has no option 'frm'"):
        detente.create(f"{users_file}:Halves", frm="third")
    trunk = torch.nn.Linear(2, 2)
    record = detente.backward(list(trunk(torch.ones(1, 2)).square().sum(dim=0)), method.__class__())
    assert record.weights == (0.5, 0.5)


def test_a_file_that_registers_may_be_loaded_twice(users_file: Path) -> None:
    users_file.write_text(SOURCE.replace("class Halves", "@detente.register\nclass Halves"), encoding="utf-8")
    for _ in range(2):
        detente.create(f"{users_file}:Halves")
    assert detente.methods()["halves"].summary == "Half of every task."


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnknownMethod, match=r"nowhere\.py' does not exist"):
        detente.create(f"{tmp_path}/nowhere.py:Halves")


@pytest.mark.parametrize("attribute", ["Halfes", "Other", "torch", ""])
def test_a_class_that_is_no_method(users_file: Path, attribute: str) -> None:
    with pytest.raises(UnknownMethod, match=f"no class {attribute!r} derived from detente.Method"):
        detente.create(f"{users_file}:{attribute}")


def test_a_file_with_a_mistake_shows_the_mistake(users_file: Path) -> None:
    before = set(sys.modules)
    users_file.write_text("import detente\n1 / 0\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        detente.create(f"{users_file}:Halves")
    assert not {name for name in set(sys.modules) - before if "users_method" in name}


# ---- rows of one kind


def test_a_function_that_makes_a_method_is_a_preset() -> None:
    def halved(*, k: int = 3, solver: Literal["exact", "frank-wolfe"] = "exact") -> Method:
        """Ask MGDA now and then."""
        return detente.wrappers.Every(detente.create("mgda", solver=solver), k=k).named("mgda-now-and-then")

    assert detente.register(halved) is halved
    row = detente.methods()["mgda-now-and-then"]
    assert row.summary == "Ask MGDA now and then." and row.source == detente.wrappers.Every.source
    assert list(row.options) == ["k", "solver"] and row.options["k"].search == (1, 5, 25)
    method = detente.create("mgda-now-and-then", k=2)
    assert isinstance(method, detente.wrappers.Every) and method.k == 2
    assert describe(method) == info_of(method) == row
    with pytest.raises(UnknownOption, match="mgda-now-and-then has no option 'n'; it has k, solver"):
        detente.create("mgda-now-and-then", n=2)
    plain = info_of(detente.wrappers.Every(detente.create("mgda")))
    assert plain.name == "every(mgda)" and list(plain.options) == ["k"]

    def other() -> Method:
        """Take its name."""
        return detente.wrappers.Every(detente.create("mgda")).named("mgda-now-and-then")

    with pytest.raises(ValueError, match=r"'mgda-now-and-then' is already registered by .*halved"):
        detente.register(other)


@pytest.mark.parametrize("name", ["inexact-mgda", "adaptive-mgda"])
def test_presets_tell_all_their_options(name: str) -> None:
    guard = detente.wrappers.registered()[name.removesuffix("-mgda")]
    row, mgda = detente.methods()[name], detente.methods()["mgda"]
    assert list(row.options) == [*guard.options, *mgda.options]
    for part in (guard, mgda):
        for option, told in part.options.items():
            assert (row.options[option].default, row.options[option].choices) == (told.default, told.choices)
    assert describe(detente.create(name)) == row


def test_methods_and_wrappers_are_rows_of_one_kind() -> None:
    for row in (*detente.methods().values(), *detente.wrappers.registered().values()):
        assert isinstance(row, Row) and row.summary.endswith(".") and row.source and callable(row.factory)


def test_what_something_is_made_around_is_no_option() -> None:
    def search(
        method: Method, shared: Any, *, gamma: float = 2.0, on_cap: Literal["skip", "error"] = "skip"
    ) -> None:
        """Search."""

    summary, options = read_signature(search, around=frozenset({"shared"}))
    assert summary == "Search." and list(options) == ["gamma", "on_cap"]
    assert options["on_cap"].choices == ("skip", "error")
    with pytest.raises(TypeError, match="option 'shared' of search has no default"):
        read_signature(search)


def test_batches_are_read_from_the_needs() -> None:
    assert {row.batches for row in detente.methods().values()} == {1, 3}
    assert detente.methods()["modo"].batches == 3
    assert detente.create("sdmgrad", solver="sgd").declares.batches == 3
    assert Declaration(name="two", source="here", needs=frozenset({"gramian", "batches:2"})).batches == 2


def test_heads_follow_from_what_is_taken() -> None:
    assert Declaration(name="a", source="here", needs=frozenset({"losses"})).heads == "weighted"
    assert Declaration(name="a", source="here", needs=frozenset({"gramian"})).heads == "own"
    assert (
        Declaration(name="a", source="here", needs=frozenset({"gramian"}), heads="weighted").heads
        == "weighted"
    )
