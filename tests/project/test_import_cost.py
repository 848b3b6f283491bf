"""`import detente` is cheap: here is what it may load, benchmarks/import_cost.py prints the seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
import torch, numpy
before = set(sys.modules)
import detente
print(json.dumps(sorted(set(sys.modules) - before)))
"""

# The rooms that one line in a training loop needs; the others are imported by whoever uses them.
CORE = {"values", "geometry", "methods", "autograd", "diagnostics", "step"}


@pytest.fixture(scope="module")
def loaded() -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [str(name) for name in json.loads(done.stdout)]


def test_only_the_core_rooms_are_loaded(loaded: list[str]) -> None:
    rooms = {name.split(".")[1] for name in loaded if name.startswith("detente.")}
    assert "step" in rooms
    assert rooms <= CORE, f"`import detente` also loads {sorted(rooms - CORE)}"


def test_no_foreign_library_is_loaded(loaded: list[str]) -> None:
    foreign = (
        {name.partition(".")[0] for name in loaded}
        - set(sys.stdlib_module_names)
        - {"detente", "torch", "numpy"}
    )
    assert not foreign, f"`import detente` also loads {sorted(foreign)}: import them where they are used"


def test_no_slow_part_of_torch_is_loaded(loaded: list[str]) -> None:
    slow = {
        "torch._dynamo",
        "torch._inductor",
        "torch.export",
        "torch.distributed.fsdp",
        "torch.utils.tensorboard",
    }
    assert not slow & set(loaded)
