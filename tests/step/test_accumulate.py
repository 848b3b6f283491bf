"""Micro-batches under one decision give what the whole batch gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import detente

TASKS = ("a", "b", "c")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(3, 1 + place) for place, task in enumerate(TASKS)})
        self.double()


def losses_of(network: Network, x: torch.Tensor, tasks: Any = TASKS) -> dict[str, torch.Tensor]:
    z = network.trunk(x)
    return {
        task: (head(z) - 2.0 * place).square().mean()
        for place, (task, head) in enumerate(network.heads.items())
        if task in tasks
    }


def batch(step: int) -> torch.Tensor:
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def gradients(network: Network) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def assert_same(one: Network, other: Network, factor: float = 1.0) -> None:
    for (name, ours), theirs in zip(gradients(one).items(), gradients(other).values(), strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, factor * theirs, rtol=1e-9, atol=1e-12, msg=name)


ALONE = [
    name
    for name, info in sorted(detente.methods().items())
    if "exact" in info.spaces or not info.takes_gradients
]


@pytest.mark.parametrize("name", ALONE)
def test_every_method_decides_as_on_the_whole_batch(name: str) -> None:
    whole, split = Network(), Network()
    methods = [detente.create(name, tasks=TASKS) for _ in range(2)]
    for step in range(3):
        x = batch(step)
        one = detente.backward(losses_of(whole, x), methods[0], measure=True)
        with detente.accumulate(methods[1], 3):
            for part in x.split((6, 4, 2)):
                other = detente.backward(losses_of(split, part), methods[1], samples=len(part))
        assert other.losses == pytest.approx(one.losses, rel=1e-12)
        assert (other.names, other.status, other.space) == (one.names, one.status, one.space)
        assert_same(split, whole)
        for network in (whole, split):
            for parameter in network.parameters():
                parameter.grad = None
        for method in methods:
            method.end_epoch()
            if "after_step" in detente.methods()[name].needs:
                # Clearly other losses than before: Adam would make a whole step of rounding.
                told = losses_of(whole, x).items()
                method.after_step({k: (0.9 - 0.2 * n) * v.detach() for n, (k, v) in enumerate(told)})


def test_without_examples_the_parts_count_alike_and_grad_is_added_to() -> None:
    whole, split, method = Network(), Network(), detente.create("mgda")
    x = batch(0)
    for network in (whole, split):
        network.trunk[0].weight.grad = torch.ones_like(network.trunk[0].weight)
    detente.backward(losses_of(whole, x), detente.create("mgda"))
    with detente.accumulate(method, 2):
        first = detente.backward(losses_of(split, x[:6]), method)
        assert first.status == "accumulating" and not first.accepted and not any(first.weights)
        assert split.trunk[0].bias.grad is None
        detente.backward(losses_of(split, x[6:]), method)
    assert_same(split, whole)


def test_a_task_in_some_of_the_parts_is_the_mean_over_them() -> None:
    whole, split, method = Network(), Network(), detente.create("aligned-mtl", tasks=TASKS)
    x = batch(0)
    losses = losses_of(whole, x) | losses_of(whole, x[:8], "b") | losses_of(whole, x[8:], "c")
    detente.backward(losses, detente.create("aligned-mtl", tasks=TASKS))
    with detente.accumulate(method, 2):
        detente.backward(losses_of(split, x[:8], "ab"), method, shared=split.trunk, samples=8)
        record = detente.backward(losses_of(split, x[8:], "ac"), method, shared=split.trunk, samples=4)
    assert sorted(record.names) == list(TASKS)
    assert_same(split, whole)


def test_under_a_scaler() -> None:
    whole, split, method = Network(), Network(), detente.create("moco")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    detente.backward(losses_of(whole, batch(0)), detente.create("moco"))
    with detente.accumulate(method, 2):
        for part in batch(0).split(6):
            detente.backward(losses_of(split, part), method, scaler=scaler)
    assert_same(split, whole, 64.0)


def test_what_does_not_go_together_is_refused_and_nothing_is_written() -> None:
    network, method = Network(), detente.create("mgda")
    x = batch(0)
    with (
        pytest.raises(ValueError, match="told of 3 micro-batches, and backward"),
        detente.accumulate(method, 3),
    ):
        detente.backward(losses_of(network, x), method)
    with detente.accumulate(method, 1):
        z = network.trunk(x)
        losses = {task: head(z).square().mean() for task, head in network.heads.items()}
        with pytest.raises(ValueError, match="features= does not go with it"):
            detente.backward(losses, method, features=z)
        with pytest.raises(ValueError, match="already active"), detente.accumulate(method, 2):
            pass
        detente.backward(losses, method)
        for parameter in network.parameters():
            parameter.grad = None
        with pytest.raises(ValueError, match="one more"):
            detente.backward(losses_of(network, x), method)
    with pytest.raises(ValueError, match="parts is 0"), detente.accumulate(method, 0):
        pass
    broken = {**losses_of(network, x), "b": network.heads["b"].bias.sum() * float("nan")}
    with detente.accumulate(method, 1), pytest.raises(ValueError, match="'b' is not finite"):
        detente.backward(broken, method)
    assert all(gradient is None for gradient in gradients(network).values())
    detente.backward(losses_of(network, x), method)  # the context is gone after an error
    assert network.trunk[0].weight.grad is not None


def test_weights_of_each_micro_batch_are_the_other_form() -> None:
    """Two calls without the context: the sum of what each gives, with losses divided by their number."""
    network, method = Network(), detente.create("mgda")
    expected: dict[str, torch.Tensor] = {}
    for part in batch(0).split(6):
        single = Network()
        detente.backward({k: v / 2 for k, v in losses_of(single, part).items()}, detente.create("mgda"))
        for name, gradient in gradients(single).items():
            assert gradient is not None
            expected[name] = expected[name] + gradient if name in expected else gradient
        detente.backward({k: v / 2 for k, v in losses_of(network, part).items()}, method)
    for name, gradient in gradients(network).items():
        torch.testing.assert_close(gradient, expected[name])
