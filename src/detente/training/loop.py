"""Train one problem with one method, and write everything down as it happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from detente.autograd.reduction import average_losses
from detente.linesearch import searches
from detente.methods import Method, describe
from detente.optim import create as create_optimizer
from detente.optim import info_of as optimizer_info
from detente.records import RunFolder
from detente.training import checkpoint
from detente.training.config import TrainingConfig
from detente.training.evaluation import averaged, evaluate, measured, to_device
from detente.training.header import VOLATILE, header, result_of
from detente.training.loggers import Loggers
from detente.training.memory import peak_bytes, reset_peak
from detente.training.method import create_method
from detente.training.order import absent_options, epoch_order, further_batches, seed_of
from detente.training.position import Position
from detente.training.problem import Problem
from detente.training.processes import Processes, Unwritten, threads
from detente.training.progress import Progress, progress
from detente.training.selection import chosen, kept
from detente.training.steps import Batch, GradientSteps, PerTaskSteps, SearchedSteps, Steps, autocast

_SAMPLES = 12
# Several processes have several clocks: at these steps the first one's decides whether a checkpoint is due.
_STEPS_BETWEEN_LOOKS = 20


def train(
    problem: Problem,
    config: TrainingConfig,
    folder: Path,
    *,
    experiment: str,
    command: str,
    label: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train, select epochs on validation data, test once; resume if the folder holds an unfinished run.

    A run that is killed at any moment and started again by the same call ends with the same weights and records
    (seconds aside) as one that was not.

    With ``config.devices`` above 1 every one of that many processes calls this function (``detente run --devices``
    and torchrun start them); each works on its part of every batch, the first one writes the folder. The numbers of a
    run depend on the number of processes by rounding, and by what draws random numbers or batch statistics.

    Args:
        problem: what to learn.
        config: how.
        folder: the run folder; made if it does not exist.
        experiment: name of the protocol, for the record.
        command: the command line, for the record.
        label: how tables call the run; None takes the method and where it is solved.
        quiet: show no progress.

    Returns:
        The result as stored in ``result.json``.

    Raises:
        ValueError: an unknown method or option, a space the method cannot be solved in, NaN in training, or another
            number of processes than ``config.devices``.
        ConfigMismatch: the folder holds a run with another configuration.
        UnwritableFolder: the folder cannot be written.
        CheckpointError: the checkpoint in the folder is damaged.
    """
    method = create_method(problem, config)
    config.baselines(problem.tasks)  # what is missing is told before anything is written
    described = describe(method)
    further_batches(described, config)
    space = config.gradients if described.takes_gradients else "none"
    if space != "none" and space not in described.spaces:
        raise ValueError(
            f"method {described.name} cannot be solved on {space!r}; it runs on {', '.join(sorted(described.spaces))}."
        )
    stored = header(
        problem,
        config,
        experiment=experiment,
        label=label or _label(config, described.name, space),
        gradients=space,
        command=command,
    )
    # A run of an earlier version, which did not know some options, goes on under their defaults.
    defaults = {f"config.{name}": value for name, value in absent_options(described, config).items()}
    processes = Processes(config.devices)
    records: RunFolder | Unwritten = Unwritten(folder)
    with ExitStack() as files:

        def begin() -> dict[str, Any] | None:
            nonlocal records
            opened = RunFolder.open_or_create(folder, stored, ignore=VOLATILE, defaults=defaults)
            records = files.enter_context(opened)
            result = opened.read().result
            return None if result is None else dict(result)

        finished = processes.first(begin)
        if finished is not None and (finished["metrics"] or not config.test):
            return finished
        with torch.random.fork_rng(), threads(config.threads):
            if finished is not None:
                return processes.first(lambda: _test_later(problem, processes.device, records, finished))
            run = _Run(problem, config, method, processes, records, stored, quiet)
            files.callback(run.loggers.close)
            run.advance()
            return run.finish()


def _test_later(
    problem: Problem, device: torch.device, records: RunFolder | Unwritten, result: Mapping[str, Any]
) -> dict[str, Any]:
    """Measure a run on test data that was finished without."""
    module = problem.model().to(device)
    whole = {**result, "metrics": _tested(problem, module, records, result["selected_epochs"])}
    records.write_result(whole)
    return whole


def _tested(
    problem: Problem, module: nn.Module, records: RunFolder | Unwritten, epochs: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Test metrics of the chosen epochs; a few examples with predictions are stored beside them."""
    found = measured(problem, module, records.path, epochs, "test")
    samples = problem.samples(module, _SAMPLES)
    if samples is not None:
        images, targets, predictions = samples
        records.write_samples(images.cpu().numpy(), _arrays(targets), _arrays(predictions))
    return found


def unrecorded_steps(problem: Problem, config: TrainingConfig, place: Path) -> Callable[[], None]:
    """What takes the next training step each time it is called, epoch after epoch without end; nothing is recorded.

    Args:
        problem: what to learn; its network is a fresh one.
        config: how; in one process.
        place: an empty folder, which stays empty.
    """
    method, processes = create_method(problem, config), Processes(config.devices)
    run = _Run(problem, config, method, processes, Unwritten(place), {}, quiet=True)
    run.model.train()
    batches: list[tuple[torch.Tensor, ...]] = []

    def step() -> None:
        if not batches:
            batches.extend(run.order(0))
        run.run_step(*batches.pop(0))

    return step


class _Run:
    """One run in progress: the objects that change while it trains."""

    def __init__(
        self,
        problem: Problem,
        config: TrainingConfig,
        method: Method,
        processes: Processes,
        records: RunFolder | Unwritten,
        stored: Mapping[str, Any],
        quiet: bool,
    ) -> None:
        self.problem, self.config, self.method = problem, config, method
        self.processes, self.records, self.stored = processes, records, stored
        self.info = describe(method)
        self.quiet, self.writes = quiet or processes.rank > 0, processes.rank == 0
        torch.manual_seed(config.seed)  # the same network in every process, and then noise of its own in each
        self.module = problem.model()
        if processes.rank > 0:
            torch.manual_seed(seed_of(config.seed, processes.rank))
        self.model, self.steps = _set_up(processes, problem, config, method, self.module)
        self.device = processes.device
        self.data = problem.split("train")
        self.further = further_batches(self.info, config)
        batches = -(-len(self.data) // config.batch_size)
        self.total = (
            config.epochs * batches
            if config.max_steps is None
            else min(config.max_steps, config.epochs * batches)
        )
        self.stride = max(1, self.total // config.record_steps)
        given = config.baselines(problem.tasks)
        self.baselines = self.signed(
            {task: {problem.main_metric[task]: value} for task, value in given.items()}
        )
        self.at = Position()
        recorded = isinstance(records, RunFolder)
        self.loggers = Loggers(config.logger if recorded else (), records.path, stored)
        self.resume()

    # ---- saving

    def resume(self) -> None:
        """Go on from the checkpoint if there is one; drop records that came after it."""
        path = self.records.path / checkpoint.FILE
        state = self.processes.first(lambda: checkpoint.load(path) if path.exists() else None)
        if state is not None:
            try:
                self.module.load_state_dict(state["model"])
                self.steps.load_state_dict(state["optimizer"])
                self.method.load_state_dict(state["method"])
                self.at = Position.restored(state["position"])
                random = state["random"]  # of one process, or of each
                checkpoint.restore_random_state(
                    random[self.processes.rank] if isinstance(random, list) else random, self.device
                )
            except (KeyError, TypeError, RuntimeError) as error:
                raise checkpoint.CheckpointError(
                    f"{path} does not fit this run ({error}). Delete the run folder to start the run again."
                ) from error
        self.records.truncate_after(self.at.step)
        if isinstance(self.records, RunFolder):
            self.loggers.begin(self.records.read() if self.loggers else None)

    def save(self) -> None:
        """A checkpoint from which the run goes on bit for bit; every process must call it."""
        random = self.processes.gathered(checkpoint.random_state(self.device))
        if not self.writes:
            return
        self.records.flush()
        state = {
            "model": self.module.state_dict(),
            "optimizer": self.steps.state_dict(),
            "method": self.method.state_dict(),
            "position": asdict(self.at),
            "random": random if len(random) > 1 else random[0],
        }
        checkpoint.save(self.records.path / checkpoint.FILE, state)

    def due(self, saved: float) -> bool:
        """Whether so long a time has passed since the last checkpoint that another one is due."""
        several = self.processes.size > 1
        if several and self.at.step % _STEPS_BETWEEN_LOOKS:
            return False
        return self.processes.first(lambda: time.monotonic() - saved > self.config.checkpoint_seconds)

    # ---- training

    def advance(self) -> None:
        """Train to the end."""
        reset_peak(self.device)
        self.model.train()
        with progress(self.stored["label"], self.total, enabled=not self.quiet) as report:
            while self.at.epoch < self.config.epochs and self.at.step < self.total:
                self.run_epoch(report)

    def run_epoch(self, report: Progress) -> None:
        """The rest of the current epoch, its validation, its record, a checkpoint."""
        config, at = self.config, self.at
        rate = self.steps.rate(at.epoch)
        order = self.order(at.epoch)
        saved = time.monotonic()
        started = time.perf_counter()
        while at.batch < len(order) and at.step < self.total:
            self.run_step(*order[at.batch])
            report(at.step)
            if self.due(saved):
                at.epoch_seconds += time.perf_counter() - started
                at.seconds += time.perf_counter() - started
                self.save()
                saved, started = time.monotonic(), time.perf_counter()
        at.epoch_seconds += time.perf_counter() - started
        self.method.end_epoch()
        searched = self.steps.end_epoch(at.epoch)
        metrics = self.processes.first(lambda: evaluate(self.problem, self.module, "validation"))
        at.history.append(self.signed(metrics))
        row = {
            "epoch": at.epoch + 1,
            "step": at.step,
            "train_loss": {task: total / at.examples[task] for task, total in at.loss_sums.items()},
            "validation": metrics,
            "seconds": at.epoch_seconds,
            "learning_rate": rate,
            "refused": at.refused,
        }
        told = self.method.epoch_record()
        if told:
            row["method"] = told
        if searched:
            row["search"] = searched
        self.records.append_epoch(row)
        self.loggers.epoch(row)
        at.epoch, at.batch, at.loss_sums, at.examples, at.refused, at.epoch_seconds = (
            at.epoch + 1,
            0,
            {},
            {},
            0,
            0.0,
        )
        candidates = [
            epoch + 1 for epoch in kept(config.selection, at.history, config.selection_k, self.baselines)
        ]
        if at.epoch in candidates and self.writes:
            checkpoint.save(checkpoint.weights_file(self.records.path, at.epoch), self.module.state_dict())
        at.seconds += time.perf_counter() - started
        self.save()
        if self.writes:
            checkpoint.keep_weights(self.records.path, candidates)
        report(
            at.step,
            " ".join(f"{task} {metrics[task][main]:.4g}" for task, main in self.problem.main_metric.items()),
        )

    def order(self, epoch: int) -> list[tuple[torch.Tensor, ...]]:
        """The examples of every step of an epoch: of its own batch, and of each further one the method compares."""
        orders = [
            epoch_order(len(self.data), self.config.seed, epoch, number) for number in range(1 + self.further)
        ]
        return list(zip(*(torch.split(one, self.config.batch_size) for one in orders), strict=True))

    def run_step(self, indices: torch.Tensor, *others: torch.Tensor) -> None:
        """One batch, with the further ones that the method compares."""
        at, config = self.at, self.config
        batches = self.batches(indices)
        if others:
            (batch,) = batches
            batches = [replace(batch, further=tuple(self.batches(one)[0] for one in others))]
        recorded = at.step % self.stride == 0
        # At most every second step, so that there are unmeasured ones left to tell what a step costs.
        measure = config.measure and at.step % max(2, self.stride) == 0 and not self.info.takes_gradients
        balance = config.balance and recorded
        started = time.perf_counter()
        try:
            record, further = self.steps.step(batches, measure=measure, balance=balance)
        except ValueError as error:
            raise ValueError(f"step {at.step + 1} of {self.records.path}: {error}") from error
        if "after_step" in self.info.needs:
            self.method.after_step(self.losses_now(batches))
        if not (measure or config.balance):
            at.step_seconds.append(time.perf_counter() - started)
        at.step += 1
        at.batch += 1
        at.refused += not record.accepted
        for name, loss in zip(record.names, record.losses, strict=True):
            at.loss_sums[name] = at.loss_sums.get(name, 0.0) + loss * len(indices)
            at.examples[name] = at.examples.get(name, 0) + len(indices)
        if recorded:
            row = {"step": at.step, "epoch": at.epoch + 1, **record.to_dict(), **further}
            self.records.append_step(row)
            self.loggers.step(row)

    def batches(self, indices: torch.Tensor) -> list[Batch]:
        """This process's part of a batch on its device, in micro-batches: as many in every process."""
        count = min(self.config.accumulate, len(indices) // self.processes.size or 1)
        parts = torch.tensor_split(self.processes.part(indices), count)
        whole = self.processes.size == 1 and count == 1
        batches = []
        for part in parts:
            inputs, labels = to_device(self.data.batch(part), self.device)
            batches.append(Batch(inputs, labels, None if whole else len(part)))
        return batches

    def losses_now(self, batches: list[Batch]) -> dict[str, torch.Tensor]:
        """The losses of the whole batch after the step."""
        sums: dict[str, torch.Tensor] = {}
        examples: dict[str, int] = {}
        with torch.no_grad(), autocast(self.config, self.device):
            for batch in batches:
                count = 1 if batch.examples is None else batch.examples
                for name, loss in self.problem.losses(self.model(batch.inputs), batch.labels).items():
                    sums[name] = sums[name] + count * loss if name in sums else count * loss
                    examples[name] = examples.get(name, 0) + count
        losses = {name: total / examples[name] for name, total in sums.items()}
        return losses if self.processes.size == 1 else average_losses(losses, samples=examples)

    def signed(self, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Each task's main metric, signed so that higher is better."""
        higher = {(metric.task, metric.name): metric.higher_is_better for metric in self.problem.metrics}
        return {
            task: metrics[task][name] if higher[task, name] else -metrics[task][name]
            for task, name in self.problem.main_metric.items()
            if task in metrics
        }

    # ---- the end

    def finish(self) -> dict[str, Any]:
        """Test the chosen epochs, once, and write the result: the work of the first process."""
        return self.processes.first(self._finish)

    def _finish(self) -> dict[str, Any]:
        started = time.perf_counter()
        config, at = self.config, self.at
        epochs = [
            epoch + 1 for epoch in chosen(config.selection, at.history, config.selection_k, self.baselines)
        ]
        assert isinstance(self.records, RunFolder), "the first process writes"
        self.records.flush()
        rows = {row["epoch"]: row["validation"] for row in self.records.read().epochs}
        validation = averaged([rows[epoch] for epoch in epochs])
        checkpoint.keep_weights(self.records.path, epochs)
        batches = -(-len(self.data) // config.batch_size)
        per_step = float(np.median(at.step_seconds)) if at.step_seconds else None
        result = result_of(
            self.stored,
            epochs=at.epoch,
            steps=at.step,
            selection=config.selection,
            selected_epochs=epochs,
            validation=validation,
            metrics=_tested(self.problem, self.module, self.records, epochs) if config.test else {},
            seconds=at.seconds + time.perf_counter() - started,
            seconds_per_step=per_step,
            seconds_per_epoch=None if per_step is None else per_step * batches,
            peak_memory_bytes=peak_bytes(self.device),
            parameters=sum(parameter.numel() for parameter in self.module.parameters()),
        )
        self.records.write_result(result)
        self.loggers.finish(result)
        return result


def _label(config: TrainingConfig, method: str, space: str) -> str:
    """What tables call a run: the method, where it is solved, and what else moves the parameters."""
    name = f"{method} ({space})" if space != "none" else method
    if config.search != "none":
        return f"{name}, {searches()[config.search].label}"
    if config.per_task:
        return config.optimizer if space == "none" else f"{config.optimizer} after {method}"
    return name


def _set_up(
    processes: Processes, problem: Problem, config: TrainingConfig, method: Method, module: nn.Module
) -> tuple[nn.Module, Steps]:
    """The network on its device, and what moves its parameters."""
    model = processes.set_up(module)
    if config.search != "none":
        return model, SearchedSteps(problem, config, method, module, model)
    if config.per_task:
        return model, PerTaskSteps(problem, config, method, module, model)
    return model, GradientSteps(problem, config, method, module, model, make_optimizer(module, config))


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Make the optimizer that a configuration names, over all parameters of the network."""
    configured = {
        "lr": config.learning_rate,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "weight_decay": config.weight_decay,
    }
    declared = optimizer_info(config.optimizer).options
    options = {name: value for name, value in configured.items() if name in declared}
    return create_optimizer(config.optimizer, list(model.parameters()), **options)


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {task: tensor.cpu().numpy() for task, tensor in tensors.items()}
