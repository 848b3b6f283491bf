"""LeNet against a slow numpy network, its partition of parameters, and a short training on real digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detente.data import load_multimnist
from detente.models import LeNet, Output


def slow_convolution(images: Any, weight: Any, bias: Any) -> Any:
    channels, _, height, width = weight.shape
    rows, columns = images.shape[1] - height + 1, images.shape[2] - width + 1
    result = np.zeros((channels, rows, columns))
    for c in range(channels):
        for i in range(rows):
            for j in range(columns):
                result[c, i, j] = (images[:, i : i + height, j : j + width] * weight[c]).sum() + bias[c]
    return result


def slow_pool(images: Any) -> Any:
    channels, rows, columns = images.shape
    return images.reshape(channels, rows // 2, 2, columns // 2, 2).max((2, 4))


def slow_network(image: Any, model: LeNet) -> tuple[Any, dict[str, Any]]:
    """The network of the paper without dropout, for one image [size, size]."""
    w = {name: value.detach().numpy() for name, value in model.named_parameters()}
    hidden = np.maximum(slow_pool(slow_convolution(image[None], w["conv1.weight"], w["conv1.bias"])), 0)
    hidden = np.maximum(slow_pool(slow_convolution(hidden, w["conv2.weight"], w["conv2.bias"])), 0)
    features = np.maximum(w["linear.weight"] @ hidden.ravel() + w["linear.bias"], 0)
    logits = {}
    for task in model.heads:
        inner = np.maximum(w[f"heads.{task}.0.weight"] @ features + w[f"heads.{task}.0.bias"], 0)
        logits[task] = w[f"heads.{task}.3.weight"] @ inner + w[f"heads.{task}.3.bias"]
    return features, logits


@pytest.mark.parametrize("size", [28, 36])
def test_forward_equals_the_slow_network(size: int) -> None:
    torch.manual_seed(0)
    model = LeNet(size=size).double().eval()
    images = torch.randn(2, 1, size, size, dtype=torch.float64)
    output = model(images)
    assert isinstance(output, Output)
    for n in range(2):
        features, logits = slow_network(images[n, 0].numpy(), model)
        assert np.allclose(output.features[n].detach().numpy(), features, rtol=0, atol=1e-12)
        for task in ("left", "right"):
            assert np.allclose(output.predictions[task][n].detach().numpy(), logits[task], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "flat"), [(28, 320), (36, 720)])
def test_numbers_of_parameters(size: int, flat: int) -> None:
    model = LeNet(size=size)
    shared = (10 * 25 + 10) + (20 * 10 * 25 + 20) + (flat * 50 + 50)
    head = (50 * 50 + 50) + (50 * 10 + 10)
    assert sum(p.numel() for p in model.shared_parameters()) == shared
    assert sum(p.numel() for p in model.task_parameters("left")) == head
    assert sum(p.numel() for p in model.parameters()) == shared + 2 * head


def test_partition_is_complete_and_true() -> None:
    torch.manual_seed(0)
    model = LeNet(dropout=0.0)
    parts = [model.shared_parameters(), model.task_parameters("left"), model.task_parameters("right")]
    listed = [id(p) for part in parts for p in part]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters()}
    model(torch.randn(8, 1, 28, 28)).predictions["left"].square().sum().backward()
    for parameter in (*parts[0], *parts[1]):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in parts[2])
    last = model.last_shared_parameters()
    assert [tuple(p.shape) for p in last] == [(50, 320), (50,)]
    assert {id(p) for p in last} <= {id(p) for p in parts[0]}


def test_heads_alone_give_the_same_predictions() -> None:
    model = LeNet().eval()
    images = torch.randn(3, 1, 28, 28)
    output = model(images)
    assert torch.equal(model.encode(images), output.features)
    alone = model.predict(output.features)
    assert list(alone) == ["left", "right"]
    assert all(torch.equal(alone[task], output.predictions[task]) for task in alone)


def test_features_are_the_only_way_to_the_encoder() -> None:
    """What `features=` relies on: cutting the graph at the representation cuts everything shared."""
    model = LeNet()
    cut = model.encode(torch.randn(2, 1, 28, 28)).detach().requires_grad_()
    sum(logits.sum() for logits in model.predict(cut).values()).backward()
    assert all(p.grad is None for p in model.shared_parameters())
    assert cut.grad is not None


def test_dropout_removes_whole_channels_of_single_images() -> None:
    torch.manual_seed(1)
    model = LeNet(dropout=0.25).train()
    seen = []
    model.channel_dropout.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out)))
    model(torch.randn(400, 1, 28, 28))
    before, after = seen[0]
    assert before.shape[1] == 20
    gone = (after == 0).flatten(2).all(2)
    assert torch.equal((after != 0).flatten(2).any(2), ~gone)
    kept = ~gone[:, :, None, None].expand_as(after)
    assert torch.allclose(after[kept], before[kept] / 0.75)
    assert abs(gone.float().mean() - 0.25) < 0.03
    assert len(gone.unique(dim=0)) > 300  # every image has its own channels


def test_dropout_of_the_heads_and_in_evaluation() -> None:
    model = LeNet(dropout=0.5)
    assert [m.p for m in model.modules() if type(m).__name__.startswith("Dropout")] == [0.5, 0.5, 0.5]
    features = torch.rand(4, 50)
    assert not torch.equal(model.predict(features)["left"], model.predict(features)["left"])
    model.eval()
    assert torch.equal(model.predict(features)["left"], model.predict(features)["left"])


def test_one_task_and_other_tasks() -> None:
    single = LeNet(outputs={"left": 10}).eval()
    assert list(single(torch.zeros(1, 1, 28, 28)).predictions) == ["left"]
    many = LeNet(size=20, outputs={"a": 2, "b": 1, "c": 7}).eval()
    shapes = {task: tuple(p.shape) for task, p in many(torch.zeros(5, 1, 20, 20)).predictions.items()}
    assert shapes == {"a": (5, 2), "b": (5, 1), "c": (5, 7)}
    assert LeNet(size=16)(torch.zeros(1, 1, 16, 16)).features.shape == (1, 50)


def test_the_same_seed_gives_the_same_network() -> None:
    states = []
    for seed in (3, 3, 4):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            states.append(LeNet().state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    again = LeNet()
    again.load_state_dict(states[0], strict=True)


def test_it_learns_real_digits() -> None:
    digits = load_multimnist().take(2000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LeNet(dropout=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(6):
            for chosen in torch.randperm(2000).split(100):
                images, labels = digits.train.batch(chosen)
                predictions = model(images).predictions
                optimizer.zero_grad()
                sum(F.cross_entropy(predictions[t], labels[t]) for t in labels).backward()
                optimizer.step()
    images, labels = digits.test.batch(slice(None))
    with torch.no_grad():
        predictions = model.eval()(images).predictions
    for task, truth in labels.items():
        assert (predictions[task].argmax(1) == truth).float().mean() > 0.6, task


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 15}, "size is 15"),
        ({"outputs": {}}, "outputs is empty"),
        ({"outputs": {"left": 0}}, "task 'left' has 0 outputs"),
        ({"outputs": {"a.b": 3}}, r"task name 'a\.b'"),
        ({"outputs": {"": 3}}, "task name ''"),
        ({"outputs": {"keys": 3}}, "task name 'keys'"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
        ({"dropout": -0.1}, r"dropout is -0\.1"),
        ({"dropout": float("nan")}, "dropout is nan"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeNet(**options)


@pytest.mark.parametrize("shape", [(1, 1, 36, 36), (1, 28, 28), (2, 3, 28, 28), (1, 1, 28, 29)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images have shape .*expects \[B, 1, 28, 28\]"):
        LeNet()(torch.zeros(shape))


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match="unknown task 'middle': this network has left, right"):
        LeNet().task_parameters("middle")
