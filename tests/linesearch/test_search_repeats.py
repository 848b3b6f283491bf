"""Passes that must be one another's repetition: under autocast, with buffers of every kind, beside other threads."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import detente
from detente.linesearch import Backtracking, FastBacktracking, SearchOptions
from detente.methods import Method
from detente.values import Combination

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


def under_autocast(inner: Any, dtype: torch.dtype) -> Any:
    def closure(features: Any = None) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return inner(features)

    return closure


def steps_of(make: Any, around: Any, inside: torch.dtype | None) -> list[Any]:
    """Four steps within ``around``; the closure itself runs in the half precision ``inside``, if it names one."""
    torch.manual_seed(0)
    encoder, heads = nn.Sequential(nn.Linear(8, 16), nn.Tanh()), two_heads(16, torch.float32)
    plain = closure_of(encoder, heads, torch.randn(32, 8))
    closure = plain if inside is None else under_autocast(plain, inside)
    search, told = make(encoder, heads), []
    with around:
        for _ in range(4):
            record = search.step(closure).to_dict()
            told.append({name: value for name, value in record.items() if name != "seconds"})
            with (
                torch.no_grad()
            ):  # copies of the parameters that lack a graph: the next step may not meet them
                told.append([loss.item() for loss in closure()[1].values()])
    return [
        *told,
        *(parameter.detach().tolist() for parameter in (*encoder.parameters(), *heads.parameters())),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "method", "precondition"),
    [
        *[(kind, name, None) for kind in KINDS for name in ("mgda", "graddrop", "pcgrad", "rlw")],
        (Backtracking, "aligned-mtl", "adam"),
    ],
)
def test_autocast_around_the_step_reaches_the_closure_alone(
    kind: Any, method: str, precondition: Any, dtype: torch.dtype
) -> None:
    """Bit for bit: directions, slopes, backwards and moves are computed as without autocast.

    Autocast also keeps copies of the parameters in half precision for as long as its region lasts; every move makes
    them stale.
    """
    options = SearchOptions(
        precondition=precondition, on_no_descent="small-step", small_step=1e-2, rounding=2.0**16
    )

    def make(encoder: Any, heads: Any) -> Any:
        return kind(detente.create(method), encoder, heads, 2.0, options=options)

    alone = steps_of(make, nullcontext(), dtype)
    assert steps_of(make, torch.autocast("cpu", dtype=dtype), None) == alone
    assert steps_of(make, torch.autocast("cpu", enabled=False), dtype) == alone
    assert len({record["eta"] for record in alone[:8:2]}) > 1 or method != "mgda"


@pytest.mark.parametrize("kind", KINDS)
def test_the_method_and_the_backward_run_without_the_callers_autocast(kind: Any) -> None:
    seen: list[tuple[str, bool]] = []

    class Looking(Method):
        """Look whether autocast is on."""

        declares = detente.Declaration(name="looking", source="this test", needs=frozenset({"gramian"}))

        def solve(self, gradients: Any) -> Combination:
            seen.append(("method", torch.is_autocast_enabled("cpu")))
            return Combination(weights=torch.ones(gradients.tasks, dtype=F64))

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: torch.Tensor) -> torch.Tensor:
            seen.append(("forward", torch.is_autocast_enabled("cpu")))
            return z.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            seen.append(("backward", torch.is_autocast_enabled("cpu")))
            return gradient

    encoder, heads = nn.Linear(8, 16), two_heads(16, torch.float32)
    plain = closure_of(lambda x: Backward.apply(encoder(x)), heads, torch.randn(32, 8))
    options = SearchOptions(on_no_descent="small-step", small_step=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kind(Looking(), encoder, heads, 1e-2, options=options).step(plain)
        assert torch.is_autocast_enabled("cpu"), "the caller's region goes on"
    expected = {("method", False), ("forward", True), ("backward", False)}
    assert set(seen) == expected


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
