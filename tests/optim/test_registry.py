"""What optimizers declare, held against the classes, and against what a run may name."""

from __future__ import annotations

import inspect
import typing
from dataclasses import fields

import pytest
import torch
from torch import nn

import detente
from detente.experiments.toy import ToyConfig
from detente.linesearch import SearchName, searches
from detente.optim import OptimizerName, create, optimizers
from detente.training.config import TrainingConfig


def test_names_of_runs_are_the_declared_ones() -> None:
    assert (
        set(typing.get_args(OptimizerName)) == set(optimizers()) == {"sgd", "adam", "adamw", "mao", "mtadam"}
    )
    assert set(typing.get_args(SearchName)) == set(searches())
    for config in (TrainingConfig, ToyConfig):
        hints = typing.get_type_hints(config)
        assert set(typing.get_args(hints["optimizer"])) == set(optimizers())
        assert set(typing.get_args(hints["search"])) == {"none", *searches()}


@pytest.mark.parametrize("name", optimizers())
def test_what_is_declared_is_so(name: str) -> None:
    info, first = optimizers()[name], nn.Parameter(torch.ones(2))
    assert info.name == name and info.summary and info.source
    optimizer = create(name, [first], lr=0.25)
    for option, declared in info.options.items():
        default = inspect.signature(type(optimizer)).parameters[option].default
        assert declared.default == default
        for value in (*declared.choices, *declared.search):
            create(name, [first], lr=0.25, **{option: value})
        if declared.search:
            assert default in declared.search
    assert optimizer.param_groups[0]["lr"] == 0.25
    reads_losses = "losses" in inspect.signature(type(optimizer).step).parameters
    assert info.per_task == reads_losses
    takes = "transform" in inspect.signature(type(optimizer)).parameters
    assert info.takes_transform == takes
    if info.per_task:
        assert len(create(name, [first], [nn.Parameter(torch.ones(1))], tasks=["a", "b"]).param_groups) == 2
    else:
        try:
            detente.optim.Contributions(optimizer, [first])
        except TypeError:
            assert not info.shares_updates
        else:
            assert info.shares_updates


def test_rows_are_of_one_kind_with_those_of_methods_and_searches() -> None:
    common = {"name", "summary", "source", "options"}
    for rows in (detente.methods(), optimizers(), searches()):
        assert list(rows) == sorted(rows)
        for name, info in rows.items():
            assert info.name == name and common <= {field.name for field in fields(info)}
            assert all(isinstance(option, detente.values.Option) for option in info.options.values())


def test_unknown_names_and_options_are_named() -> None:
    weight = [nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match="unknown optimizer 'mau'; did you mean 'mao'"):
        create("mau", weight)
    with pytest.raises(TypeError, match="optimizer adam has no option 'momentum'; it has betas"):
        create("adam", weight, momentum=0.9)
    with pytest.raises(TypeError, match="optimizer mtadam has no option 'transform'"):
        create("mtadam", weight, transform=detente.create("pcgrad"))
