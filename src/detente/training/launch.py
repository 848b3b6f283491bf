"""Start one command in several processes, and end with them."""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from collections.abc import Sequence

_STARTER = "DETENTE_STARTER"
_SECONDS_BETWEEN_LOOKS = 1.0


class ProcessEnded(RuntimeError):
    """One of several processes was killed."""


def launched() -> bool:
    """Whether this process is one of several that were started together, by :func:`launch` or by torchrun."""
    return "WORLD_SIZE" in os.environ


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run ``detente`` with these arguments in so many processes on this machine (torch's elastic agent).

    If one fails, the others are ended. The cores are shared out unless ``OMP_NUM_THREADS`` is set.

    Returns:
        The exit code of the process which failed first, 0 if none did.

    Raises:
        ProcessEnded: a process was ended by a signal, so that it could not tell anything itself.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ[_STARTER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        local_addr="localhost",
        start_method="spawn",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "detente", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise ProcessEnded(
                f"process {rank} of {processes} was ended by signal {-failure.exitcode}, and the others with it. The "
                "same command goes on where the last checkpoint stands."
            ) from error
        return int(failure.exitcode)
    return 0


def end_with_the_starter() -> None:
    """See that this process does not outlive the one that started it, where that is known.

    Two sets of processes would otherwise write to one folder when a killed command is given again.
    """
    starter = os.environ.get(_STARTER)
    if starter is None or not launched():
        return

    def watch() -> None:
        while os.getppid() == int(starter):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, name="starter", daemon=True).start()
