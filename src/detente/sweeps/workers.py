"""Where runs are carried out: in this process, or in the workers of a Ray cluster."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from detente.records.atomic import write_bytes
from detente.records.lock import FolderInUse
from detente.sweeps.asked import Failure
from detente.training.config import TrainingConfig

Outcome = Mapping[str, Any] | Failure

_SECONDS_FOR_AN_ORPHAN = 60.0
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_ANSWER = 10.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_LEAST_BYTES = 1 << 16
_LONGEST_REASON = 600


@dataclass(frozen=True)
class Job:
    """One run, as it travels to a worker.

    Attributes:
        name: of its folder.
        folder: its place.
        experiment: a protocol's name, or file and class of a problem.
        config: all of it.
        label: how tables call it.
        command: that repeats it alone.
        files: name to content of the user's own files, which a machine may not have.
        place: the working directory that names of files are relative to.
    """

    name: str
    folder: Path
    experiment: str
    config: TrainingConfig
    label: str | None
    command: str
    files: Mapping[str, bytes]
    place: Path


class Workers(Protocol):
    """What carries out runs."""

    @property
    def free(self) -> int:
        """How many more runs can start now."""

    def start(self, job: Job) -> None:
        """Begin a run."""

    def wait(self, seconds: float) -> list[tuple[str, Outcome]]:
        """Names and outcomes of the runs that ended, at the latest after so many seconds."""

    def close(self) -> None:
        """Let go of everything; runs that have not ended stop."""


def carry_out(job: Job) -> Outcome:
    """Train, or go on, or measure what is finished; whatever a run raises is its outcome."""
    from detente.experiments import find

    changed = [name for name, content in job.files.items() if Path(name).read_bytes() != content]
    if changed:
        return Failure(
            f"{', '.join(changed)} changed since the sweep was started; put it back, or sweep anew."
        )
    give_up = time.monotonic() + _SECONDS_FOR_AN_ORPHAN
    while True:
        try:
            experiment = find(job.experiment)
            return experiment.run(job.config, job.folder, label=job.label, command=job.command, quiet=True)
        except FolderInUse as error:
            # A worker of a sweep that was killed may live on for some seconds.
            if time.monotonic() > give_up:
                return failure_of(error, job.folder)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        except (Exception, SystemExit) as error:  # a training function may end in sys.exit
            return failure_of(error, job.folder)


def failure_of(error: BaseException, folder: Path) -> Failure:
    """What a run raised, in one line; a full disk is everybody's failure."""
    text = " ".join(str(error).split())
    reason = f"{type(error).__name__}: {text[:_LONGEST_REASON]}"
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in _NO_ROOM:
            return Failure(reason, everywhere=True)
        chain = chain.__cause__ or chain.__context__
    place = next(place for place in (folder, *folder.parents) if place.exists())
    # Some libraries do not say why they could not write.
    return Failure(reason, everywhere=shutil.disk_usage(place).free < _LEAST_BYTES)


class InProcess:
    """One run after the other, in this process."""

    def __init__(self) -> None:
        self._job: Job | None = None

    @property
    def free(self) -> int:
        """One, unless a run waits."""
        return int(self._job is None)

    def start(self, job: Job) -> None:
        """Keep it for :meth:`wait`."""
        self._job = job

    def wait(self, seconds: float) -> list[tuple[str, Outcome]]:
        """Carry out the run that waits, however long that takes."""
        job, self._job = self._job, None
        return [] if job is None else [(job.name, carry_out(job))]

    def close(self) -> None:
        """Nothing is held."""


class OnRay:
    """Runs in the workers of a Ray cluster: an embedded one, or one that is there.

    Args:
        workers: runs at the same time.
        threads: of each.
        address: of a cluster; None starts one on this machine that ends with this process.
        retries: how often a run is started again whose worker died.
        folder: of all runs; on another machine it must be the same one.

    Raises:
        ImportError: Ray is not installed.
        RuntimeError: there is no such cluster, or a machine of it does not see the folder.
    """

    def __init__(self, workers: int, threads: int, address: str | None, retries: int, folder: Path) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError(
                "more than one worker needs Ray: pip install 'detente[sweep]', or leave --workers at 1."
            ) from error
        self._ray: Any = ray
        self._workers, self._retries = workers, retries
        # Ray tells at length how it is doing; what matters is raised.
        logging.getLogger("ray").setLevel(logging.ERROR)
        settings: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        try:
            if address is not None:
                _reach(address)
            if address is None:
                # "local", since without an address Ray would join whatever cluster this machine has.
                ray.init(address="local", num_cpus=workers * threads, include_dashboard=False, **settings)
            else:
                ray.init(address=address, **settings)
        except (OSError, ValueError, RuntimeError) as error:
            where = "a Ray cluster on this machine" if address is None else f"the Ray cluster at {address}"
            raise RuntimeError(f"{where} cannot be used: {' '.join(str(error).split())}") from error
        self._environment = {"env_vars": {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": _search_path()}}
        self._remote = ray.remote(num_cpus=threads, max_retries=0, runtime_env=self._environment)(
            _carried_out
        )
        self._running: dict[Any, tuple[Job, int]] = {}
        try:
            self._probe(folder)
        except BaseException:
            self.close()
            raise

    @property
    def free(self) -> int:
        """Workers without a run."""
        return self._workers - len(self._running)

    def start(self, job: Job, started: int = 1) -> None:
        """Hand a run to a worker."""
        self._running[self._remote.remote(job)] = (job, started)

    def wait(self, seconds: float) -> list[tuple[str, Outcome]]:
        """Runs that ended; one whose worker died is started again, and goes on from its checkpoint."""
        if not self._running:
            return []
        done, _ = self._ray.wait(list(self._running), timeout=seconds)
        found: list[tuple[str, Outcome]] = []
        for reference in done:
            job, started = self._running.pop(reference)
            try:
                found.append((job.name, self._ray.get(reference)))
            except self._ray.exceptions.RayError as error:
                if started <= self._retries:
                    self.start(job, started + 1)
                else:
                    told = str(error).strip().splitlines()[0]
                    found.append((job.name, Failure(f"its worker died {started} times ({told})")))
        return found

    def close(self) -> None:
        """Leave the cluster; an embedded one ends."""
        self._ray.shutdown()

    def _probe(self, folder: Path) -> None:
        """See that every machine writes where this one reads."""
        import uuid

        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        mark = folder / f".probe-{uuid.uuid4().hex}"
        mark.write_bytes(b"")
        try:
            for node in self._ray.nodes():
                if not node["Alive"]:
                    continue
                here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                look = self._ray.remote(num_cpus=0, scheduling_strategy=here, runtime_env=self._environment)(
                    _sees
                )
                if not self._ray.get(look.remote(str(mark))):
                    raise RuntimeError(
                        f"machine {node['NodeManagerHostname']} of the cluster does not see {folder}: give --out a "
                        "folder on storage that all machines share."
                    )
        finally:
            mark.unlink(missing_ok=True)


def _reach(address: str) -> None:
    """See that somebody listens there: Ray itself would try for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_ANSWER).close()


def _sees(path: str) -> bool:
    """In a worker."""
    return os.path.exists(path)


def _search_path() -> str:
    """Where this process finds détente: its workers must run the same."""
    own = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(
        dict.fromkeys([own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    )


def _carried_out(job: Job) -> Outcome:
    """In a worker: write the user's files where they are named, if they are not there, and go."""
    if job.place.is_dir():
        os.chdir(job.place)
    elif job.files:
        os.chdir(tempfile.mkdtemp(prefix="detente-"))
    for name, content in job.files.items():
        path = Path(name)
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, content)
            except OSError as error:
                return Failure(
                    f"{name} cannot be written on this machine ({error}); name it by a relative path."
                )
        elif path.read_bytes() != content:
            return Failure(f"{name} on this machine differs from the one the sweep was started with.")
    return carry_out(job)
