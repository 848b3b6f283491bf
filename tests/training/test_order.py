"""Which examples a step learns from, and the further batches of methods that compare the gradients of several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import detente
from detente.data import MultiDigits, load_multimnist
from detente.experiments.multimnist import MultiMNIST, MultiMNISTConfig
from detente.records import read_run
from detente.training import checkpoint, train
from detente.training.order import epoch_order

CONFIG = MultiMNISTConfig(
    method="modo", epochs=2, batch_size=64, learning_rate=0.05, momentum=0.5, dropout=0.0, record_steps=8
)


@pytest.fixture(scope="module")
def digits() -> MultiDigits:
    return load_multimnist().take(150)  # 3 steps per epoch, the last one short


def run(folder: Path, digits: MultiDigits, config: MultiMNISTConfig) -> dict[str, torch.Tensor]:
    train(MultiMNIST(config, digits), config, folder, experiment="multimnist", command="test", quiet=True)
    found: dict[str, torch.Tensor] = checkpoint.load(folder / checkpoint.FILE)["model"]
    return found


def by_hand(digits: MultiDigits, config: MultiMNISTConfig, **options: Any) -> dict[str, torch.Tensor]:
    """The loop written down: three orders for every epoch, and the second and third batch as `extra`."""
    problem = MultiMNIST(config, digits)
    torch.manual_seed(config.seed)
    model = problem.model()
    method = detente.create(config.method, tasks=tuple(problem.tasks), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=config.momentum or 0.0)
    data = problem.split("train")
    for epoch in range(config.epochs):
        orders = [epoch_order(len(data), config.seed, epoch, number) for number in range(3)]
        for start in range(0, len(data), config.batch_size):
            batches = [data.batch(order[start : start + config.batch_size]) for order in orders]
            losses = [problem.losses(model(inputs), labels) for inputs, labels in batches]
            record = detente.backward(
                losses[0], method, shared=list(model.shared_parameters()), extra=losses[1:]
            )
            assert not record.notes
            optimizer.step()
            optimizer.zero_grad()
    return dict(model.state_dict())


@pytest.mark.parametrize(("name", "option"), [("modo", ()), ("sdmgrad", ("solver=sgd",))])
def test_methods_that_compare_batches_get_independent_ones(
    tmp_path: Path, digits: MultiDigits, name: str, option: tuple[str, ...]
) -> None:
    config = replace(CONFIG, method=name, option=option)
    found = run(tmp_path / "independent", digits, config)
    expected = by_hand(digits, config, **config.method_options())
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    same = run(tmp_path / "same", digits, replace(config, further_batches="same"))
    assert any(not torch.equal(found[key], tensor) for key, tensor in same.items())
    noted = [row["notes"] for row in read_run(tmp_path / "same").steps]
    assert noted and all("one batch served for all three" in " ".join(notes) for notes in noted)
    assert not any(row.get("notes") for row in read_run(tmp_path / "independent").steps)


def test_orders_are_permutations_of_their_own() -> None:
    orders = [
        epoch_order(1000, seed, epoch, number) for seed in (0, 1) for epoch in (0, 1) for number in (0, 1, 2)
    ]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
    # Two independent permutations agree in one place on average, and hardly ever in eight.
    for place, order in enumerate(orders):
        assert all(int((order == other).sum()) < 8 for other in orders[:place])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"accumulate": 2}, "accumulate 2"),
        ({"search": "backtracking", "momentum": 0.0}, "search backtracking"),
        ({"method": "sdmgrad", "option": ("solver=sgd",), "memory": "low"}, "memory low"),
        ({"method": "sdmgrad", "option": ("solver=sgd",), "gradients": "features"}, "gradients features"),
    ],
)
def test_steps_that_take_one_batch_say_so_before_anything_is_written(
    tmp_path: Path, digits: MultiDigits, changed: dict[str, Any], told: str
) -> None:
    config = replace(CONFIG, **changed)
    with pytest.raises(ValueError, match=f"3 independent batches, which {told} does not go with") as raised:
        run(tmp_path / "run", digits, config)
    assert "further_batches same" in str(raised.value)
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run", digits, replace(config, epochs=1, max_steps=1, further_batches="same"))
