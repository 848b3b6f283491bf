"""Passes that must be one another's repetition: under autocast, with buffers of every kind, beside other threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import detente
from detente.linesearch import Backtracking, FastBacktracking, SearchOptions

KINDS = [Backtracking, FastBacktracking]
F64 = torch.float64


def two_heads(width: int = 4, dtype: torch.dtype = F64) -> nn.ModuleDict:
    torch.manual_seed(1)
    return nn.ModuleDict({name: nn.Linear(width, 1, dtype=dtype) for name in "ab"})


def closure_of(encoder: Any, heads: Any, x: torch.Tensor) -> Any:
    def closure(features: Any = None) -> Any:
        z = encoder(x) if features is None else features
        return z, {
            name: (head(z).to(x.dtype) - (place + 1) * x[:, :1]).square().mean()
            for place, (name, head) in enumerate(heads.items())
        }

    return closure


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_around_the_step_is_autocast_inside_the_closure(kind: Any) -> None:
    """Autocast keeps copies of the parameters in half precision for as long as its region lasts; every move of the
    parameters makes them stale. Beside the closure's own region, which is left after each pass, nothing may differ."""
    ends: list[tuple[list[torch.Tensor], list[Any]]] = []
    for outside in (True, False):
        torch.manual_seed(0)
        encoder, heads = nn.Sequential(nn.Linear(8, 16), nn.Tanh()), two_heads(16, torch.float32)
        x = torch.randn(32, 8)
        inner = closure_of(encoder, heads, x)

        def inside(features: Any = None, inner: Any = inner) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return inner(features)

        search, told = kind(detente.create("mgda"), encoder, heads, 2.0), []
        for _ in range(4):
            if outside:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    found = search.step(inner)
                    told.append({name: loss.item() for name, loss in inner()[1].items()})
            else:
                found = search.step(inside)
                told.append({name: loss.item() for name, loss in inside()[1].items()})
            told.append((found.status, found.trials))
        ends.append(([p.detach().clone() for p in (*encoder.parameters(), *heads.parameters())], told))
    assert ends[0][1][1::2] == ends[1][1][1::2]
    for one, other in zip(ends[0][1][::2], ends[1][1][::2], strict=True):
        assert one == pytest.approx(other, rel=0.03)
    for mine, other in zip(ends[0][0], ends[1][0], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0.02)


class Scaled(nn.Module):
    """Divides by a running scale, updated first: in place, or by another tensor in its stead."""

    def __init__(self, replaced: bool) -> None:
        super().__init__()
        self.replaced = replaced
        self.register_buffer("scale", torch.ones((), dtype=F64))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        new = 0.5 * self.scale + 5 * z.detach().abs().max()
        if self.replaced:
            self.scale = new
        else:
            self.scale.copy_(new)
        return z / self.scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("replaced", [True, False])
def test_a_buffer_that_the_graph_reads_is_that_of_its_forward(kind: Any, replaced: bool) -> None:
    """The encoder moves along the gradient of the sum that torch's own backward gives."""

    def made() -> Any:
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(4, 4, dtype=F64), Scaled(replaced))
        heads = two_heads()
        return encoder, heads, closure_of(encoder, heads, torch.randn(16, 4, dtype=F64))

    encoder, heads, closure = made()
    before = encoder[0].weight.detach().clone()
    search = kind(
        detente.create("uniform"),
        encoder,
        heads,
        1e-3,
        options=SearchOptions(on_no_descent="small-step", small_step=1e-3),
    )
    eta = search.step(closure).eta
    twin, _, plain = made()
    sum(plain()[1].values()).backward()
    torch.testing.assert_close((before - encoder[0].weight.detach()) / eta, twin[0].weight.grad)
    assert encoder[1].scale.equal(twin[1].scale)


class Cached(nn.Module):
    """A buffer that is made on first use: its name reserved, or not even that."""

    def __init__(self, reserved: bool) -> None:
        super().__init__()
        if reserved:
            self.register_buffer("made", None)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if getattr(self, "made", None) is None:
            if hasattr(self, "made"):
                self.made = torch.rand(z.shape[1], dtype=z.dtype) + 0.5
            else:
                self.register_buffer("made", torch.rand(z.shape[1], dtype=z.dtype) + 0.5)
        return z * self.made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reserved", [True, False])
def test_a_buffer_that_the_first_pass_fills(kind: Any, reserved: bool) -> None:
    torch.manual_seed(0)
    encoder, heads = nn.Sequential(nn.Linear(4, 4, dtype=F64), Cached(reserved)), two_heads()
    inner, passes = closure_of(encoder, heads, torch.randn(16, 4, dtype=F64)), []

    def closure(features: Any = None) -> Any:
        passes.append(features)
        if len(passes) == 3:
            raise RuntimeError("stopped")
        return inner(features)

    search = kind(detente.create("mgda"), encoder, heads, 5.0)
    with pytest.raises(RuntimeError, match="stopped"):
        search.step(closure)
    assert getattr(encoder[1], "made", None) is None
    assert ("made" in encoder[1]._buffers) == reserved
    torch.manual_seed(5)
    found = search.step(inner)
    assert found.trials > 1
    torch.manual_seed(5)
    assert encoder[1].made.equal(torch.rand(4, dtype=F64) + 0.5), "what the first pass drew"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize("kind", KINDS)
def test_a_scripted_encoder(kind: Any) -> None:
    torch.manual_seed(0)
    encoder = torch.jit.script(nn.Sequential(nn.Linear(4, 4, dtype=F64), nn.BatchNorm1d(4, dtype=F64)))
    heads = two_heads()
    found = kind(detente.create("mgda"), encoder, heads, 50.0).step(
        closure_of(encoder, heads, torch.randn(16, 4, dtype=F64))
    )
    assert found.accepted and found.trials > 1
    assert [int(b) for name, b in encoder.named_buffers() if name.endswith("tracked")] == [1]


def test_modules_that_run_in_another_thread_are_left_alone() -> None:
    """A loader that normalises its images while the step runs is no part of the closure."""
    torch.manual_seed(0)
    encoder, heads, loader = nn.Linear(4, 4, dtype=F64), two_heads(), nn.BatchNorm1d(4, dtype=F64)
    x = torch.randn(16, 4, dtype=F64)
    inner = closure_of(encoder, heads, x)

    def closure(features: Any = None) -> Any:
        other = threading.Thread(target=lambda: loader(x))
        other.start()
        other.join()
        return inner(features)

    found = Backtracking(detente.create("mgda"), encoder, heads, 5.0).step(closure)
    assert found.trunk_forwards > 2
    assert int(loader.num_batches_tracked) == found.trunk_forwards
