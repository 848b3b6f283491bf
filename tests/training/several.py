"""Run in every one of several processes: trains the configurations of a file, one after the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from detente.data import load_multimnist
from detente.experiments.multimnist import MultiMNIST, MultiMNISTConfig
from detente.training import train


def main(asked: Path) -> None:
    """Each entry of the file is [folder, examples, configuration]."""
    torch.set_num_threads(1)
    digits = load_multimnist()
    for folder, examples, given in json.loads(asked.read_text()):
        config = MultiMNISTConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
        problem = MultiMNIST(config, digits.take(examples))
        train(problem, config, Path(folder), experiment="multimnist", command="test", quiet=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
