"""Parameters of which every process holds a shard: refused by name, before a step that would leave them where they are.

``fully_shard`` and ``FullyShardedDataParallel`` lend the graph whole copies and free them after use. A gradient becomes
that of the shards only inside their own backward; what ``torch.autograd.grad`` finds for a copy never reaches them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist

_ADVICE = (
    "Task gradients are taken with torch.autograd.grad, and those of shards exist only inside that wrapper's own "
    "backward. Use DistributedDataParallel or the plain module, with memory='low' or activation checkpointing where "
    "memory is short; features= does not help, since the encoder's gradient would pass that backward too. Nothing was "
    "changed."
)


def check_whole(tensors: Iterable[torch.Tensor]) -> None:
    """Check that no parameter is a shard, or a whole copy lent by those who shard it.

    Args:
        tensors: parameters as a caller names them, or leaves of the graph.

    Raises:
        ValueError: one is; how it is sharded is told.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    lent = _lent()
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    for tensor in tensors:
        told = ""
        if isinstance(tensor, dtensor):
            told = "is a DTensor, one shard on every process (fully_shard, or tensor parallelism)"
        elif getattr(tensor, "_is_flat_param", False):
            told = "is a flat parameter of FullyShardedDataParallel"
        elif id(tensor) in lent or (tensor.numel() and not tensor.untyped_storage().nbytes()):
            told = "is the whole copy of one that fully_shard keeps in shards"
        if told:
            raise ValueError(f"a parameter of shape {tuple(tensor.shape)} {told}. {_ADVICE}")


def _lent() -> set[int]:
    """Return identities of the copies that modules under ``fully_shard`` hold: nothing else tells while they live."""
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", None)
    if not states:
        return set()
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in states if isinstance(module, FSDPModule)]
    modules = [module for module in sharded if isinstance(module, torch.nn.Module)]
    return {id(parameter) for module in modules for parameter in module.parameters()}
