"""What runs inside the processes: models whose parameters are shards."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import detente
from detente.linesearch import Backtracking

# On a CPU, torch 2.6's fully_shard fails in its own forward: 'Stream' object has no attribute 'record_event'.
FULLY_SHARD_RUNS = not torch.__version__.startswith("2.6.")


def network() -> tuple[nn.Sequential, nn.ModuleDict]:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
    return trunk, nn.ModuleDict({task: nn.Linear(6, 1) for task in ("a", "b")})


def refusals() -> dict[str, str]:
    """What every way of sharding is told."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import DTensor, Replicate, distribute_module

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))

    def layer_by_layer(trunk: nn.Sequential) -> nn.Module:
        for layer in trunk:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        return fully_shard(trunk, mesh=mesh)

    def old(trunk: nn.Module, originals: bool) -> nn.Module:
        return FullyShardedDataParallel(
            trunk, use_orig_params=originals, device_id=torch.device("cpu"), device_mesh=mesh
        )

    ways: dict[str, Any] = {
        "flat": lambda trunk: old(trunk, False),
        "flat with originals": lambda trunk: old(trunk, True),
        "dtensors": lambda trunk: distribute_module(trunk, mesh),
    }
    if FULLY_SHARD_RUNS:
        ways["in one piece"] = lambda trunk: fully_shard(trunk, mesh=mesh)
        ways["layer by layer"] = layer_by_layer
    told = {}
    for way, wrap in ways.items():
        for asked in ("found", "named", "features", "layer", "alone", "search"):
            trunk, heads = network()
            trunk = wrap(trunk)
            x = torch.randn(3, 4)
            if way == "dtensors":
                x = DTensor.from_local(x, mesh, [Replicate()])
            named = list(trunk.parameters())

            def closure(features: Any = None, trunk: Any = trunk, heads: Any = heads, x: Any = x) -> Any:
                z = trunk(x)
                z = z.to_local() if isinstance(z, DTensor) else z
                return z, {task: head(z).square().mean() for task, head in heads.items()}

            options: dict[str, Any] = {}
            try:
                if asked == "search":
                    Backtracking(detente.create("mgda"), trunk, heads, 0.1).step(closure)
                else:
                    z, losses = closure()
                    if asked == "named":
                        options = {"shared": trunk, "task_specific": heads}
                    elif asked == "features":
                        options = {"features": z}
                    elif asked == "layer":
                        options = {"solve_on": named[-1]}
                    elif asked == "alone":
                        options = {"process_group": False}
                    detente.backward(losses, detente.create("mgda"), **options)
                found = "no error"
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            if any(parameter.grad is not None for parameter in (*trunk.parameters(), *heads.parameters())):
                found = "a .grad was written"
            told[f"{way}, {asked}"] = found
    return told
