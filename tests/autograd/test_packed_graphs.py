"""Two thousand networks whose construction tells who owns what, packed in many ways: the same losses computed apart.

Every step agrees with gradients that were taken task by task, one forward each, or is refused with a request for
``shared=``. Losses that are picked from one tensor are never refused where task gradients are taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from twins.by_hand import ByHand, differences
from twins.worlds import HEADS, PACKINGS, PICKED, TRUNKS, Plan, World, plan_of

import detente

GRAPHS, BLOCK = 2000, 100
METHODS = (
    "mgda",
    "pcgrad",
    "upgrad",
    "aligned-mtl",
    "nash-mtl",
    "cagrad",
    "uniform",
    "uncertainty",
    "imtl-g",
)


def method_of(plan: Plan) -> str:
    return METHODS[plan.number % len(METHODS)]


def may_be_refused(plan: Plan) -> bool:
    """Gradients that would tell are not taken in this mode, or one piece hides more than a picked tensor does."""
    if plan.mode.startswith("shared") or not plan.packed:
        return False
    picked = plan.packing in PICKED and plan.piece.endswith(("eager", "trunk"))
    return plan.mode in ("low", "features", "layer") or not picked


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def options_of(world: World, z: torch.Tensor) -> dict[str, Any]:
    mode = world.plan.mode
    options: dict[str, Any] = {}
    if mode.startswith("shared"):
        names = world.shared(range(len(world.names)))
        options["shared"] = [tensor for name, tensor in world.tensors().items() if name in names]
    if mode.endswith(("low", "batched")):
        options["memory"] = mode.split()[-1]
    elif mode == "features":
        options["features"] = z
    elif mode == "layer":
        options["solve_on"] = world.layer
    return options


def compare(plan: Plan) -> str | None:
    """Carry out a plan's steps: None if all agree, ``refused``, or what is wrong."""
    world, name = World(plan), method_of(plan)
    method = detente.create(name)
    twin = ByHand(world, plan.mode, detente.create(name))
    for present in plan.steps:
        for tensor in world.tensors().values():
            tensor.grad = None
        run = world.run()
        losses = {world.names[number]: run.losses[world.names[number]] for number in present}
        try:
            record = detente.backward(losses, method, **options_of(world, run.z))
        except Exception as error:
            if "shared=" not in str(error) or not may_be_refused(plan):
                return f"{type(error).__name__}: {error}"
            written = any(tensor.grad is not None for tensor in world.tensors().values())
            return "a refused step wrote .grad" if written else "refused"
        wrong = differences(world, record, twin.step(present))
        if wrong:
            return f"tasks {present}: " + "; ".join(wrong)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("block", range(GRAPHS // BLOCK))
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks
def test_every_graph_agrees_or_is_refused_by_name(block: int) -> None:
    results: Counter[str] = Counter()
    wrong = []
    for number in range(block * BLOCK, (block + 1) * BLOCK):
        plan = plan_of(number)
        result = compare(plan)
        results[result if result in (None, "refused") else "wrong"] += 1
        if result not in (None, "refused"):
            wrong.append(f"{method_of(plan)} {plan}\n    {result}")
    assert not wrong, f"{len(wrong)} of {BLOCK} graphs are wrong:\n" + "\n".join(wrong)
    assert results[None] + results["refused"] == BLOCK
    assert results["refused"] <= BLOCK // 20


def test_the_two_thousand_hold_what_they_promise() -> None:
    plans = [plan_of(number) for number in range(GRAPHS)]
    assert len({plan.number for plan in plans}) == GRAPHS
    assert 60 <= sum(plan.piece.startswith("compiled") for plan in plans) <= 100
    kinds = Counter(kind for plan in plans for kind in {task.kind for task in plan.tasks})
    for kind in (*HEADS, "row", "codebook", "commitment", "temperature", "physics", "force"):
        assert kinds[kind] >= 30, f"{kind}: {kinds[kind]}"
    for what, names in (
        (Counter(plan.trunk for plan in plans), TRUNKS),
        (Counter(plan.packing for plan in plans if plan.mode == "exact"), (*PACKINGS, "apart")),
        (Counter(plan.mode for plan in plans), ("exact", "low", "batched", "features", "layer", "shared")),
        (Counter(plan.piece for plan in plans), ("scripted whole", "scripted heads", "scripted trunk")),
    ):
        for name in names:
            assert what[name] >= 20, f"{name}: {what[name]}"
    assert sum(len(plan.steps) > 1 for plan in plans) >= 200
    assert sum(plan.packed for plan in plans) >= GRAPHS // 2
    # Whatever an engine does, no more than these may be refused in modes that take no gradients of the heads.
    assert sum(may_be_refused(p) and p.mode in ("low", "features", "layer") for p in plans) <= GRAPHS // 25


@pytest.mark.parametrize("block", range(4))
def test_the_construction_is_what_autograd_finds(block: int) -> None:
    """The losses apart depend on what the construction says, and packed they have the same values."""
    for number in range(block, GRAPHS // 2, 16):
        plan = plan_of(number)
        if not plan.piece.startswith("compiled"):
            world = World(plan)
            tensors, run = world.tensors(), world.run()
            for task, name in enumerate(world.names):
                loss = world.alone(task)
                found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
                reached = {at for at, gradient in zip(tensors, found, strict=True) if gradient is not None}
                assert reached == world.reached(task), f"{name} of {plan}"
                assert loss.item() == pytest.approx(run.losses[name].item(), rel=1e-10)


def test_a_scripted_world_is_past_its_warm_up() -> None:
    for plan in map(plan_of, range(GRAPHS)):
        if plan.piece == "scripted whole":
            assert "CppFunction" in type(World(plan).run().z.grad_fn).__name__, f"more than one node: {plan}"
