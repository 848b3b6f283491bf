"""The fast search on branches of a representation: the same steps as on the representation itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import detente
from detente.linesearch import FastBacktracking


class Net(nn.Module):
    """An encoder with one or two outputs, and two heads that read all of them."""

    def __init__(self, scales: int) -> None:
        super().__init__()
        torch.manual_seed(scales)
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.Tanh()) for _ in range(scales))
        self.heads = nn.ModuleDict({task: nn.Linear(5 * scales, 1) for task in ("a", "b")})
        self.double()

    def losses(self, read: dict[str, Any]) -> dict[str, torch.Tensor]:
        found = {}
        for place, (task, head) in enumerate(self.heads.items()):
            parts = read[task] if isinstance(read[task], tuple) else (read[task],)
            found[task] = (head(torch.cat(parts, 1)) - place).square().mean()
        return found


@pytest.mark.parametrize("name", ["mgda", "uniform", "pcgrad", "nash-mtl"])
@pytest.mark.parametrize("scales", [1, 2])
def test_branches_take_the_same_steps(name: str, scales: int) -> None:
    nets = [Net(scales)]
    nets.append(copy.deepcopy(nets[0]))
    ends = []
    for branched, net in zip((False, True), nets, strict=True):
        search = FastBacktracking(detente.create(name), net.encoders, net.heads, lr_ub=2.0)
        told = []
        for step in range(4):
            x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))

            def closure(features: Any = None, net: Net = net, branched: bool = branched, x: Any = x) -> Any:
                z = features
                if features is None:
                    z = tuple(encoder(x) for encoder in net.encoders)
                    z = z[0] if scales == 1 else z
                    z = detente.branch(z, list(net.heads)) if branched else z
                return z, net.losses(z if branched else dict.fromkeys(net.heads, z))

            record = search.step(closure)
            told.append((record.status, record.eta, record.trials))
        ends.append((told, [parameter.detach().clone() for parameter in net.parameters()]))
    assert ends[0][0] == ends[1][0]
    assert any(trials > 1 for _, _, trials in ends[0][0])  # else no trial read moved branches
    for one, other in zip(ends[0][1], ends[1][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)
    assert not torch.equal(ends[1][1][0], Net(scales).encoders[0][0].weight)
