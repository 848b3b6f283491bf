"""`--export`: the weights of a finished run for use outside, as a plain state_dict in a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detente.cli.console import UsageError

RULE = "the best mean of the tasks' main metrics on validation data among the selected epochs"


def check_export(file: Path | None, experiment: Any) -> None:
    """See before anything is trained that the weights can be written.

    Raises:
        UsageError: another suffix, no such folder, or a protocol that keeps no weights.
    """
    if file is None:
        return
    if file.suffix != ".safetensors":
        raise UsageError(
            f"--export writes safetensors: name the file {file.stem}.safetensors, not {file.name}."
        )
    if not file.parent.is_dir():
        raise UsageError(f"--export: there is no folder {file.parent}.")
    if experiment.trainer is not None:
        raise UsageError(f"--export: {experiment.name} keeps no weights.")


def export(run: Any, file: Path) -> int:
    """Write the weights of a finished run; where several epochs were selected, those of the best.

    Args:
        run: from :func:`detente.records.read_run`.
        file: replaced if it is there, at once and never in part.

    Returns:
        The epoch, counted from 1.

    Raises:
        CheckpointError: the weights are missing or damaged.
        ValueError: the network's state holds something else than tensors.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    from detente.records import write_bytes
    from detente.training import checkpoint

    epoch = best_epoch(run)
    state = checkpoint.load(checkpoint.weights_file(run.path, epoch))
    strange = [name for name, value in state.items() if not hasattr(value, "contiguous")]
    if strange:
        raise ValueError(f"{strange[0]} of the network's state is no tensor; safetensors hold tensors only.")
    # Tied parameters become equal ones: the file holds every name of the state_dict.
    tensors = {name: value.detach().clone().contiguous() for name, value in state.items()}
    about = {key: str(run.config[key]) for key in ("experiment", "method", "seed")}
    write_bytes(file, save(tensors, {**about, "epoch": str(epoch), "rule": RULE}))
    return epoch


def best_epoch(run: Any) -> int:
    """Of the selected epochs the one with the best mean main metric on validation data, of equals the first."""
    selected: list[int] = run.result["selected_epochs"]
    if len(selected) == 1:
        return selected[0]
    rows = {row["epoch"]: row["validation"] for row in run.epochs if row["epoch"] in selected}

    def goodness(epoch: int) -> float:
        metrics = [run.main_metric(task) for task in run.tasks]
        values: list[float | None] = [rows[epoch][metric.task][metric.name] for metric in metrics]
        signs = [1 if metric.higher_is_better else -1 for metric in metrics]
        if None in values:  # it diverged
            return float("-inf")
        return float(sum(sign * (value or 0.0) for sign, value in zip(signs, values, strict=True)))

    return max(sorted(selected), key=goodness)
