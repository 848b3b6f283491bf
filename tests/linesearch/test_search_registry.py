"""The declared searches: their rows, the options in them, and one made by name."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import detente
from detente.linesearch import (
    Backtracking,
    FastBacktracking,
    SearchOptions,
    UnknownSearch,
    create,
    searches,
)
from detente.linesearch.direction import ParameterDirection
from detente.linesearch.search import Search, SearchDeclaration
from detente.linesearch.searches import describe
from detente.training.config import TrainingConfig

KINDS = {"backtracking": Backtracking, "fast": FastBacktracking}
LACKING = {"backtracking": "check_true", "fast": "precondition"}


def test_the_rows_are_those_of_the_command_line() -> None:
    offered = typing.get_args(typing.get_type_hints(TrainingConfig)["search"])
    assert set(searches()) == set(KINDS) == set(offered) - {"none"}
    for name, info in searches().items():
        assert info.name == name
        assert info.summary and info.summary.endswith(".") and "Filatov" in info.source
        assert info.space == {"backtracking": "exact", "fast": "features"}[name]


@pytest.mark.parametrize("name", KINDS)
def test_options_are_those_of_the_constructor_and_of_search_options(name: str) -> None:
    constructor = inspect.signature(KINDS[name]).parameters
    defaults = {option: constructor[option].default for option in ("gamma", "c", "max_trials")}
    defaults |= {field.name: field.default for field in fields(SearchOptions)}
    del defaults["modules"], defaults[LACKING[name]]
    options = searches()[name].options
    assert {option: row.default for option, row in options.items()} == defaults
    assert options["on_cap"].choices == ("skip", "error")
    assert set(options["lower_ub"].choices) == {None, "cap", "divided"}
    assert options["patience"].choices == options["small_step"].choices == ()


@pytest.mark.parametrize("name", KINDS)
def test_every_value_of_every_grid_makes_a_search(name: str) -> None:
    theta = torch.nn.Parameter(torch.zeros(2))
    grids = {option: row.search for option, row in searches()[name].options.items() if row.search}
    assert grids
    for option, values in grids.items():
        assert searches()[name].options[option].default in values
        for value in values:
            made = create(name, detente.create("mgda"), [theta], [], 0.1, **{option: value})
            assert type(made) is KINDS[name]
            assert value in (getattr(made, option, object()), getattr(made.options, option, object()))


def test_a_search_by_name_is_that_search() -> None:
    def closure(features: Any = None) -> Any:
        return None, [theta.square().sum(), (theta - 1).square().sum()]

    records = []
    for by_name in (True, False):
        theta = torch.nn.Parameter(torch.tensor([3.0, 2.0]))
        method = detente.create("mgda")
        search = (
            create("backtracking", method, [theta], [], 4.0, c=0.3, check_steps=0)
            if by_name
            else Backtracking(method, [theta], [], 4.0, c=0.3, options=SearchOptions(check_steps=0))
        )
        records.append({**search.step(closure).to_dict(), "seconds": None})
    assert records[0] == records[1] and records[0]["trunk_forwards"] == 1 + records[0]["trials"]


def test_unknown_names_and_options() -> None:
    theta = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(UnknownSearch, match="unknown search 'backtrackin'; did you mean 'backtracking'"):
        create("backtrackin", detente.create("mgda"), [theta], [], 0.1)
    with pytest.raises(TypeError, match="lenght"):
        create("fast", detente.create("mgda"), [theta], [], 0.1, lenght=3)
    with pytest.raises(ValueError, match="FastBacktracking has no option precondition"):
        create("fast", detente.create("mgda"), [theta], [], 0.1, precondition="adam")


def test_a_grid_over_no_option_is_refused() -> None:
    class Odd(Search):
        """Declare a grid over nothing."""

        declares: ClassVar[SearchDeclaration] = SearchDeclaration(
            name="odd", source="this test", direction=ParameterDirection, search={"eta": (1.0,)}
        )

    with pytest.raises(TypeError, match="Odd declares a grid over 'eta'"):
        describe(Odd)


def test_options_cannot_be_set_later() -> None:
    options = SearchOptions()
    with pytest.raises(AttributeError, match="cannot assign"):
        options.patience = 3  # type: ignore[misc]
    assert isinstance(options.plain(), Mapping) and options.plain()["patience"] == 10


def test_options_are_stored_as_plain_numbers() -> None:
    options = SearchOptions(
        on_no_descent="small-step", small_step=torch.tensor(0.5), patience=np.int64(3), rounding=np.float32(2)
    )  # type: ignore[arg-type]
    kinds = {type(getattr(options, name)) for name in ("small_step", "rounding")}
    assert (options.small_step, options.patience, options.rounding) == (0.5, 3, 2.0)
    assert kinds == {float} and type(options.patience) is int
    assert options == SearchOptions(
        on_no_descent="small-step", small_step=0.5, patience=3, rounding=2.0
    ) and hash(options)
