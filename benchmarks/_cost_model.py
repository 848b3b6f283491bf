"""What a step of `detente.backward` sends, computes and holds, on paper.

Pure functions of what a method declares and of sizes; no method is known by its name. Messages are those of a step
after the first, accepted, with every task on every rank and ``scale="native"``; a test holds them against those that
real processes send. Work and memory are leading terms, and nothing is overlapped, as in the engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

from detente.values import MethodInfo

Kind = Literal["all-reduce", "reduce-scatter", "all-gather", "broadcast"]
Space = Literal["none", "features", "layer", "exact"]
Mode = Literal["fast", "batched", "low"]

KINDS: tuple[Kind, ...] = ("all-reduce", "reduce-scatter", "all-gather", "broadcast")
DOUBLE = 8  # bytes of a loss, a weight, a flag, an entry of the Gramian
# What can be told from inner products that are added up over the ranks; any other need asks for whole gradients.
NUMBERS = frozenset({"losses", "gramian", "epoch", "after_step"})


@dataclass(frozen=True)
class Sizes:
    """What a step is made of.

    Attributes:
        tasks: T.
        shared: P, entries of all shared parameters.
        own: H, entries of all heads together.
        ranks: R.
        tensors: parameter tensors, shared and own.
        shared_tensors: the shared ones, which are the blocks of methods that look at blocks.
        features: entries of each tensor of one rank's representation; together F.
        layer: L, entries of the parameters of ``solve_on=``.
        buckets: entries of the shared parameters whose rows ``memory="low"`` takes together, see :func:`buckets_of`.
        number: bytes of one entry of a gradient.
    """

    tasks: int
    shared: int
    own: int
    ranks: int = 1
    tensors: int = 1
    shared_tensors: int = 1
    features: tuple[int, ...] = ()
    layer: int = 0
    buckets: tuple[int, ...] = ()
    number: int = 4

    @property
    def part(self) -> int:
        """Entries of one rank's part of a row, padding included."""
        return ceil(self.shared / self.ranks)


def buckets_of(parameters: Iterable[int]) -> tuple[int, ...]:
    """Entries of the buckets of ``memory="low"``, from those of the parameters in the order in which a backward pass
    meets them: as many together as are no more than the largest alone.
    """
    parameters = list(parameters)
    found = [0]
    for entries in parameters:
        if found[-1] and found[-1] + entries > max(parameters):
            found.append(0)
        found[-1] += entries
    return tuple(found)


@dataclass(frozen=True)
class Message:
    """One collective.

    Attributes:
        kind: which.
        bytes: what each rank hands over: the tensor that is summed or sent, the row that is scattered, the part that is
            gathered.
        what: for the reader.
    """

    kind: Kind
    bytes: int
    what: str


def whole_rows(info: MethodInfo) -> bool:
    """Whether every rank needs the gradients of the whole batch, and not a part of each."""
    return not info.needs <= NUMBERS


def messages(
    info: MethodInfo,
    space: Space,
    sizes: Sizes,
    *,
    memory: Mode = "fast",
    further: int = 0,
    micro_batches: int = 1,
    measure: bool = False,
) -> list[Message]:
    """The collectives of one step, in order; none on a single rank.

    Args:
        info: what the method declares.
        space: where a method that takes gradients takes them.
        sizes: of the model and the job.
        memory, measure: as for ``backward``; ``low`` goes with methods of inner products only.
        further: batches passed as ``extra=``.
        micro_batches: of ``detente.accumulate``; the space is then ``exact``.
    """
    if sizes.ranks == 1:
        return []
    tasks, flags = DOUBLE * sizes.tasks, DOUBLE * sizes.tensors
    announced = Message("all-gather", DOUBLE * 3 + tasks, "announcement")
    losses = Message("all-reduce", tasks, "losses")
    found = [announced, losses] * (micro_batches - 1) + [announced]
    if not (info.takes_gradients or measure or micro_batches > 1):
        found += [losses] if "losses" in info.needs else []
        found.append(Message("broadcast", tasks, "weights"))
        found.append(Message("all-reduce", tasks + flags, "losses and flags"))
        return [*found, Message("all-reduce", sizes.number * (sizes.shared + sizes.own), "gradients")]

    whole = whole_rows(info)
    partial = not whole and space != "layer"
    low = memory == "low" and space == "exact"
    columns = sizes.layer if space == "layer" else sizes.shared
    row = Message("all-reduce", sizes.number * columns, "a task's gradient")
    scattered = Message("reduce-scatter", sizes.number * sizes.part * sizes.ranks, "a task's gradient")
    if low:
        found += _rows_in_buckets(sizes)
    elif space != "features":
        found += [scattered if partial else row] * sizes.tasks
    elif whole:
        found += _columns(info, sizes)
    numbers = Message("all-reduce", 2 * tasks + flags, "losses and flags")
    gramian = Message("all-reduce", numbers.bytes + tasks * sizes.tasks, "losses, flags and Gramian")
    found.append(gramian if partial else numbers)
    found += ([row] * sizes.tasks + [numbers]) * further  # of further batches every rank gets the whole rows
    if info.gives != "direction":
        blocks = sizes.shared_tensors if info.gives == "blocks" else 1
        found.append(Message("broadcast", tasks * blocks, "weights"))
    if low or space != "exact":
        found.append(Message("all-reduce", sizes.number * sizes.shared, "gradients"))
    elif partial:
        found.append(Message("all-gather", sizes.number * sizes.part, "direction"))
    if sizes.own:
        found.append(Message("all-reduce", sizes.number * sizes.own, "own gradients"))
    return found


def _rows_in_buckets(sizes: Sizes) -> list[Message]:
    """T rows of a few parameters at a time, whose order is told first."""
    entries = [sizes.tasks * sizes.ranks * ceil(bucket / sizes.ranks) for bucket in sizes.buckets]
    return [
        Message("all-gather", DOUBLE * sizes.shared_tensors, "order of parameters"),
        *(Message("reduce-scatter", sizes.number * count, "T rows of a bucket") for count in entries),
    ]


def _columns(info: MethodInfo, sizes: Sizes) -> list[Message]:
    """The gradients of the representation, and where a method looks at it the representation, for every rank."""
    found = [Message("all-gather", DOUBLE * len(sizes.features), "widths")]
    for width in sizes.features:
        found.append(Message("all-gather", sizes.number * sizes.tasks * width, "columns of T gradients"))
        if "activations" in info.needs:
            found.append(Message("all-gather", sizes.number * width, "representation"))
    return found


# ---- what a collective costs


@dataclass(frozen=True)
class Network:
    """Links between ranks, as a ring or a tree sees them.

    Attributes:
        latency: seconds of one hop.
        bandwidth: bytes a second that one rank sends, while it receives as many.
        trees: whether a short all-reduce may go up and down a binary tree instead of around the ring.
    """

    latency: float
    bandwidth: float
    trees: bool = True


def hops(kind: Kind, ranks: int) -> int:
    """Hops one after another; a broadcast goes down a binary tree, everything else around a ring."""
    around = ranks - 1
    return {
        "all-reduce": 2 * around,
        "reduce-scatter": around,
        "all-gather": around,
        "broadcast": ceil(log2(ranks)),
    }[kind]


def volume(kind: Kind, ranks: int) -> float:
    """Bytes that each rank sends, for every byte of :attr:`Message.bytes`."""
    around = ranks - 1
    return {
        "all-reduce": 2 * around / ranks,
        "reduce-scatter": around / ranks,
        "all-gather": float(around),
        "broadcast": float(ceil(log2(ranks))),
    }[kind]


def seconds_of(message: Message, ranks: int, network: Network) -> float:
    """Seconds of one collective."""
    ring = hops(message.kind, ranks) * network.latency
    ring += volume(message.kind, ranks) * message.bytes / network.bandwidth
    if message.kind != "all-reduce" or not network.trees:
        return ring
    return min(ring, 2 * ceil(log2(ranks)) * network.latency + 2 * message.bytes / network.bandwidth)


def sent(found: Iterable[Message], ranks: int) -> float:
    """Bytes that one rank sends in all of these."""
    return sum(volume(message.kind, ranks) * message.bytes for message in found)


# ---- what is computed and held


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one step on one rank.

    Attributes:
        network: forward and backward passes.
        products: Gramian, in float64.
        combination: the weighted sum of the gradients.
    """

    network: float
    products: float
    combination: float


def backwards(
    info: MethodInfo,
    space: Space,
    tasks: int,
    *,
    memory: Mode = "fast",
    further: int = 0,
    gradients: bool = False,
) -> tuple[int, int]:
    """How often the trunk is walked backward, and each of the heads.

    Args:
        info, space, further: as for :func:`messages`.
        tasks: T.
        memory: as for ``backward``.
        gradients: whether task gradients are taken though the method needs none.
    """
    if not (info.takes_gradients or gradients):
        return 1, 1
    if space == "features":
        return 1, 1
    if space == "layer":
        return 1, 2 + further  # the walk of the heads ends at the layer
    if memory == "low":
        return tasks + 1, 2
    return tasks * (1 + further), (tasks if memory == "batched" else 1) + further


def work(
    info: MethodInfo, space: Space, sizes: Sizes, *, uses: int, memory: Mode = "fast", further: int = 0
) -> Work:
    """Operations of one step.

    Args:
        info, space, sizes, further: as for :func:`messages`.
        uses: how often a parameter is used in one rank's part of the batch: its tokens in a transformer.
        memory: as for ``backward``.
    """
    trunk, heads = backwards(info, space, sizes.tasks, memory=memory, further=further)
    # A multiplication and an addition per use forward, and twice that backward: for the input and for the parameter.
    network = 2.0 * uses * (sizes.shared + sizes.own) * (1 + further)
    network += 4.0 * uses * (sizes.shared * trunk + sizes.own * heads)
    if not info.takes_gradients:
        return Work(network, 0.0, 0.0)
    if space == "layer":
        network += 2.0 * uses * sizes.layer * sizes.tasks * (1 + further)
    columns = _held_columns(info, space, sizes)
    return Work(network, 2.0 * columns * sizes.tasks**2 * (1 + further), 2.0 * columns * sizes.tasks)


def _held_columns(info: MethodInfo, space: Space, sizes: Sizes) -> int:
    """Columns of the Jacobian that one rank holds."""
    if space == "features":
        return sum(sizes.features) * (sizes.ranks if whole_rows(info) else 1)
    if space == "layer":
        return sizes.layer
    return sizes.shared if whole_rows(info) else sizes.part


def held(
    info: MethodInfo,
    space: Space,
    sizes: Sizes,
    *,
    memory: Mode = "fast",
    further: int = 0,
    micro_batches: int = 1,
    state: float = 0.0,
    moment: tuple[float, float] = (0.0, 1.0),
) -> float:
    """Bytes of gradients that one rank holds at the peak of a step, those that end in ``.grad`` included.

    Parameters and the graph come on top, and where autograd hands out transposed gradients one copy more of what is
    being packed.

    Args:
        info, space, sizes, further, micro_batches: as for :func:`messages`.
        memory: as for ``backward``.
        state: numbers that the method keeps, for every entry of the T rows.
        moment: numbers that it needs while it combines, for every entry of the T rows and for every column.
    """
    tasks, shared, own, several = sizes.tasks, sizes.shared, sizes.own, sizes.ranks > 1
    # What waits to be added over the ranks lies beside the sum.
    all_shared, all_own = (2 * shared, 2 * own) if several else (shared, own)
    whole, features = whole_rows(info), sum(sizes.features)
    if not (info.takes_gradients or micro_batches > 1):
        return sizes.number * float(all_shared + all_own)
    if memory == "low" and space == "exact":
        most = max(sizes.buckets)
        # On several ranks the sum of a rank's columns lies beside the rows; one row more while it is taken.
        rows = tasks * most + (tasks * ceil(most / sizes.ranks) if several else 0)
        carried = max(all_shared + own, shared + all_own)
        return sizes.number * float(rows + max(most + tasks * features + own, carried))

    columns = _held_columns(info, space, sizes)
    kept = (1 + further + state) * tasks * columns
    combining = moment[0] * tasks * columns + moment[1] * columns + own
    if space != "exact":
        kept += (
            2 * tasks * features if space == "features" and several and whole else 0
        )  # the rank's own; as sent
        gathered = (
            tasks * columns if space == "features" and several and whole else 0
        )  # received, not yet in order
        carried = max(all_shared + own, shared + all_own) + (columns if space == "features" else 0)
        return sizes.number * (kept + max(gathered, combining, carried))
    row = sizes.part * sizes.ranks if several and not whole else 0
    kept += row
    if micro_batches > 1:
        kept = tasks * shared + shared + (kept if several else 0)
    taken = tasks * (shared + own) if memory == "batched" else shared + own
    carried = (columns if row else 0) + shared + all_own
    return sizes.number * float(kept + max(taken, combining, carried))
