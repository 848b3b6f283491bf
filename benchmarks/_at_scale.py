"""The cost model read off: which methods cost alike, a middling job, and one of 1 B parameters on 1 024 ranks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

import detente
from benchmarks._cost_model import (
    Mode,
    Network,
    Sizes,
    Space,
    backwards,
    buckets_of,
    held,
    messages,
    seconds_of,
    sent,
    whole_rows,
    work,
)
from detente.training.memory import peak_allocated
from detente.values import MethodInfo

Rows = list[tuple[str, ...]]
SPACES: tuple[Space, ...] = ("features", "layer", "exact")


@dataclass(frozen=True)
class Machine:
    """What one rank is assumed to be able to do.

    Attributes:
        speed: floating-point operations a second that forward and backward passes reach.
        double: the same in float64, for Gramians.
        memory: bytes.
        network: its links.
        solving: seconds a method takes on the host, once the numbers are there.
    """

    speed: float
    double: float
    memory: float
    network: Network
    solving: float


# A published accelerator of 2023: 989 Tflop/s in bfloat16, of which training reaches 40 %; 34 Tflop/s in float64, of
# which long thin products are given half; 80 GB; one 400 Gbit/s adapter each, of which collectives reach 80 %.
MACHINE = Machine(400e12, 17e12, 80e9, Network(5e-6, 40e9), 2e-3)

WIDTH, TOKENS, GRAPH_AND_MORE = 2048, 8192, 12e9  # parameters and Adam's moments, in float32


def _transformer(layers: int) -> list[int]:
    """Entries of each parameter, in the order of the forward pass: an embedding of 50 000 tokens, then the layers."""
    layer = [WIDTH, WIDTH, 3 * WIDTH**2, WIDTH**2, WIDTH, WIDTH, 4 * WIDTH**2, 4 * WIDTH**2]
    return [50_000 * WIDTH, *layer * layers]


def _resnet50() -> list[int]:
    """Entries of each parameter, in the order of the forward pass, without the last layer."""
    found, inside = [64 * 3 * 49, 64, 64], 64
    for middle, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            outside = 4 * middle
            for weight, scale in (
                (inside * middle, middle),
                (9 * middle**2, middle),
                (middle * outside, outside),
            ):
                found += [weight, scale, scale]
            found += [inside * outside, outside, outside] if block == 0 else []
            inside = outside
    return found


def _sizes(parameters: list[int], heads: list[int], **more: Any) -> Sizes:
    return Sizes(
        tasks=more.pop("tasks"),
        shared=sum(parameters),
        own=sum(heads),
        tensors=len(parameters) + len(heads),
        shared_tensors=len(parameters),
        buckets=buckets_of(reversed(parameters)),
        **more,
    )


# 18 layers of width 2048; 20 heads of 1 000 outputs; 8 192 tokens on each rank; solve_on= is the last matrix.
LARGE = _sizes(
    _transformer(18),
    20 * [WIDTH * 1000],
    tasks=20,
    ranks=1024,
    features=(TOKENS * WIDTH,),
    layer=4 * WIDTH**2,
)
# ResNet-50 with 8 heads of 10 outputs on 8 ranks, 32 pictures on each; solve_on= is the last convolution.
MIDDLING = _sizes(
    _resnet50(),
    8 * [2048 * 10, 10],
    tasks=8,
    ranks=8,
    features=(32 * 2048,),
    layer=512 * 2048,
)


@cache
def memory_of(name: str) -> tuple[float, tuple[float, float]]:
    """What a method keeps for every entry of the T rows, and needs while it combines for every entry and column.

    Found by running it on matrices of zeros and ones, with enough columns that nothing else counts.
    """
    few, many = 300_000, 400_000
    kept, peaks = [], []
    for tasks in (2, 4):
        sizes = []
        for columns in (few, many):
            method, jacobian = detente.create(name), torch.ones(tasks, columns)
            losses = [1.0] * tasks
            detente.combine(method, jacobian, losses=losses)
            sizes.append(sum(buffer.nbytes for buffer in method.buffers()))
            peaks.append(peak_allocated(lambda: detente.combine(method, jacobian, losses=losses)))  # noqa: B023
        kept.append((sizes[1] - sizes[0]) / (4 * tasks * (many - few)))
    at_two, at_four = ((more - less) / (4 * (many - few)) for less, more in (peaks[:2], peaks[2:]))
    each = (at_four - at_two) / 2
    return round(kept[0], 2), (round(each, 2), round(at_two - 2 * each, 2))


def kinds() -> dict[str, list[str]]:
    """Methods that send and hold the same, each under a name made of what they declare."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, info in detente.methods().items():
        found[_kind(name, info)].append(name)
    return dict(sorted(found.items()))


def _kind(name: str, info: MethodInfo) -> str:
    if not info.takes_gradients:
        return "losses, weights of" if "losses" in info.needs else "fixed or drawn weights"
    words = ["whole gradients" if whole_rows(info) else "inner products"]
    words.append(
        {"weights": "weights", "blocks": "weights for blocks", "direction": "a direction"}[info.gives]
    )
    kept, _ = memory_of(name)
    words += ["activations"] if "activations" in info.needs else []
    words += [f"batches {info.batches}"] if info.batches > 1 else []
    words += [f"keeps {kept:.0f} T P numbers"] if kept else []
    return ", ".join(words)


def kind_rows() -> Rows:
    """Who belongs where."""
    return [
        ("kind", "methods", "spaces"),
        *(
            (
                kind,
                ", ".join(names),
                ", ".join(sorted(set.union(*(set(detente.methods()[n].spaces) for n in names)))),
            )
            for kind, names in kinds().items()
        ),
    ]


def _choices() -> list[tuple[str, str, Space, dict[str, Any]]]:
    """One row for each kind and space, and the variants: label, a method of the kind, space, options."""
    found: list[tuple[str, str, Space, dict[str, Any]]] = []
    for kind, names in kinds().items():
        name, info = names[0], detente.methods()[names[0]]
        if not info.takes_gradients:
            found.append((kind, name, "none", {}))
            continue
        found += [(kind, name, space, {}) for space in SPACES if space in info.spaces]
        found += [
            (kind, name, space, {"further": info.batches - 1})
            for space in SPACES
            if info.batches > 1 and space in info.spaces
        ]
        if not whole_rows(info):
            found.append((kind, name, "exact", {"micro_batches": 4}))
            found += [(kind, name, "exact", {"memory": memory}) for memory in ("low", "batched")]
    return found


def label(space: Space, options: dict[str, Any]) -> str:
    """A space and what goes beyond it, for a table."""
    told = {
        "further": "{} further batches",
        "micro_batches": "accumulate({})",
        "memory": 'memory="{}"',
    }
    return ", ".join([space, *(told[key].format(value) for key, value in options.items())])


@dataclass(frozen=True)
class Cost:
    """A step on paper: collectives, bytes sent by a rank, seconds of messages, of passes, of the rest, bytes held."""

    collectives: int
    sent: float
    messages: float
    passes: float
    rest: float
    held: float

    @property
    def seconds(self) -> float:
        """Of the whole step; nothing is overlapped."""
        return self.messages + self.passes + self.rest


def cost(
    name: str,
    space: Space,
    sizes: Sizes,
    machine: Machine = MACHINE,
    *,
    uses: int = TOKENS,
    memory: Mode = "fast",
    further: int = 0,
    micro_batches: int = 1,
) -> Cost:
    """Of one step of a registered method; the examples of a step are those of all of its micro-batches."""
    info = detente.methods()[name]
    found = messages(info, space, sizes, memory=memory, further=further, micro_batches=micro_batches)
    done = work(info, space, sizes, uses=uses, memory=memory, further=further)
    state, moment = memory_of(name) if info.takes_gradients else (0.0, (0.0, 1.0))
    bytes_held = held(
        info,
        space,
        sizes,
        memory=memory,
        further=further,
        micro_batches=micro_batches,
        state=state,
        moment=moment,
    )
    return Cost(
        len(found),
        sent(found, sizes.ranks),
        sum(seconds_of(message, sizes.ranks, machine.network) for message in found),
        done.network / machine.speed,
        (done.products + done.combination) / machine.double + machine.solving,
        bytes_held,
    )


def middling_rows() -> Rows:
    """What is sent in the middling job."""
    found: Rows = [
        ("kind", "space", "collectives", "MB sent by a rank", "backwards of trunk, heads", "MB held")
    ]
    for kind, name, space, options in _choices():
        told = cost(name, space, MIDDLING, **options)
        chosen = {key: value for key, value in options.items() if key in ("memory", "further")}
        trunk, heads = backwards(detente.methods()[name], space, MIDDLING.tasks, **chosen)
        found.append(
            (
                kind,
                label(space, options),
                str(told.collectives),
                f"{told.sent / 1e6:,.1f}",
                f"{trunk}, {heads}",
                f"{told.held / 1e6:,.0f}",
            )
        )
    return found


def large_rows(number: int = 4) -> Rows:
    """The large job, gradients of ``number`` bytes an entry."""
    sizes = replace(LARGE, number=number)
    plain, best = cost("uniform", "none", sizes).seconds, overlapped(sizes)
    found: Rows = [
        (
            "kind",
            "space",
            "GB sent by a rank",
            "messages",
            "passes",
            "step / summed",
            "step / overlapped",
            "GB held",
            "fits",
        )
    ]
    for kind, name, space, options in _choices():
        told = cost(name, space, sizes, **options)
        fits = told.held + GRAPH_AND_MORE <= MACHINE.memory
        found.append(
            (
                kind,
                label(space, options),
                f"{told.sent / 1e9:,.1f}",
                f"{told.messages:,.2f} s",
                f"{told.passes:.2f} s",
                f"{told.seconds / plain:,.2f}",
                f"{told.seconds / best:,.2f}",
                f"{told.held / 1e9:,.1f}",
                "yes" if fits else "no",
            )
        )
    return found


def ratio_rows() -> Rows:
    """A step of a method of inner products over one of the summed losses: by tasks, ranks and tokens of a rank."""
    name = next(
        name for name, info in detente.methods().items() if info.takes_gradients and not whole_rows(info)
    )
    tokens = (1024, 8192, 65536)
    # Space, mean over so many steps of which one looks, tasks.
    lines: tuple[tuple[Space, int, int], ...] = (
        ("exact", 1, 2),
        ("exact", 1, 8),
        ("exact", 1, 20),
        ("exact", 10, 20),
        ("features", 1, 20),
    )
    found: Rows = [("space", "T", "ranks", *(f"{count:,} tokens" for count in tokens))]
    for space, every, tasks in lines:
        for ranks in (8, 64, 1024):
            ratios = []
            for count in tokens:
                own, features = tasks * WIDTH * 1000, (count * WIDTH,)
                sizes = replace(LARGE, tasks=tasks, ranks=ranks, own=own, features=features)
                plain = cost("uniform", "none", sizes, uses=count).seconds
                ratio = (cost(name, space, sizes, uses=count).seconds / plain + every - 1) / every
                ratios.append(f"{ratio:.2f}")
            found.append(
                (space if every == 1 else f"{space}, every(k={every})", str(tasks), str(ranks), *ratios)
            )
    return found


def overlapped(sizes: Sizes, machine: Machine = MACHINE, *, uses: int = TOKENS) -> float:
    """Seconds of a step of the summed losses whose messages hide behind the backward pass as far as they can."""
    plain = cost("uniform", "none", sizes, machine, uses=uses)
    forward = plain.passes / 3
    return forward + max(plain.passes - forward, plain.messages)


def tables() -> dict[str, Rows]:
    """All tables of the model by their names."""
    return {
        "kinds": kind_rows(),
        "middling job": middling_rows(),
        "large job": large_rows(),
        "large job, ratios": ratio_rows(),
    }
