"""MultiMNIST: two overlapping digits in one image, two tasks that compete for one network.

Source: Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization" (2018), section 5.1, and
their public code. Every digit of a split gives one composite, in which it is the left digit; its partner
on the right is drawn uniformly from the same split and may be the same digit. On a canvas of 36 x 36 the
left digit covers rows and columns 0 to 27, the right one rows and columns 6 to 33; where they overlap the
larger value counts.

``size=36`` keeps that canvas. ``size=28`` takes row and column floor((i + 1/2) * 36 / 28) for i = 0 to 27,
the nearest neighbour of each pixel's centre, which is what the paper's code obtains from its imaging
library. (``torch.nn.functional.interpolate(mode="nearest")`` would take floor(i * 36 / 28) instead.)
The paper's code also stretches every composite so that its largest value becomes 255; since every MNIST
digit reaches 254 or 255 by itself, the values are left as they are here.

The partners depend on the seed, the split and its number of digits alone, drawn as
:mod:`detente.data.streams` describes: the same on every machine, with every number of workers, and with
every version of numpy and torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detente.data.mnist import Digits, load_digits
from detente.data.streams import check_seed, random_integers

__all__ = ["DigitPairs", "MultiDigits", "compose", "load_multimnist"]

CANVAS = 36
MEAN = 0.1307
DEVIATION = 0.3081
_LEFT = slice(0, 28)
_RIGHT = slice(6, 34)
_STREAMS = {"train": (1, 0), "validation": (1, 1), "test": (1, 2)}
_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class DigitPairs:
    """Composites of one split.

    Attributes:
        images: uint8 [N, S, S], 0 for the background.
        labels: ``"left"`` and ``"right"``, each int64 [N] from 0 to 9.
    """

    images: Tensor
    labels: dict[str, Tensor]

    def __post_init__(self) -> None:
        if self.images.ndim != 3 or self.images.dtype != torch.uint8:
            raise ValueError(
                f"composites are {self.images.dtype} {tuple(self.images.shape)}: expected uint8 [N, S, S]"
            )
        for task, labels in self.labels.items():
            if labels.shape != self.images.shape[:1] or labels.dtype != torch.int64:
                raise ValueError(
                    f"labels of task {task!r} are {labels.dtype} {tuple(labels.shape)}: expected int64 "
                    f"[{len(self.images)}], one for each image"
                )

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor | Sequence[int] | slice) -> tuple[Tensor, dict[str, Tensor]]:
        """Give normalised images and the labels at ``indices``.

        Args:
            indices: int64 [B], a sequence of positions, or a slice.

        Returns:
            float32 [B, 1, S, S], pixel / 255 less the mean 0.1307 over the standard deviation 0.3081, and
            the labels of each task, int64 [B]. Both are copies unless ``indices`` is a slice, for which
            the labels are views.
        """
        where = indices if isinstance(indices, Tensor | slice) else torch.as_tensor(list(indices)).long()
        images = self.images[where].unsqueeze(1).to(torch.float32)
        images = images.div_(255.0).sub_(MEAN).div_(DEVIATION)
        return images, {task: labels[where] for task, labels in self.labels.items()}

    def take(self, count: int) -> DigitPairs:
        """Give the first ``count`` composites (all of them when there are fewer), sharing memory."""
        if count < 1:
            raise ValueError(f"take({count}): expected at least 1 composite")
        return DigitPairs(self.images[:count], {task: labels[:count] for task, labels in self.labels.items()})


@dataclass(frozen=True, eq=False)
class MultiDigits:
    """The three splits of MultiMNIST and how they were made.

    Attributes:
        train, validation, test: the composites.
        source: ``"packaged"`` (digits inside the package) or ``"files"`` (the four original files).
        size: side of the images in pixels, 28 or 36.
        seed: the seed of the partners.
    """

    train: DigitPairs
    validation: DigitPairs
    test: DigitPairs
    source: Literal["packaged", "files"]
    size: int
    seed: int

    def take(self, count: int) -> MultiDigits:
        """Give the first ``count`` composites of each split, for quick trials and tests."""
        return replace(
            self,
            train=self.train.take(count),
            validation=self.validation.take(count),
            test=self.test.take(count),
        )

    def describe(self) -> dict[str, object]:
        """Describe the data for the record of a run: plain values that fit into JSON.

        ``sha256`` covers images and labels of the three splits, so that two runs with the same value saw
        the same composites.
        """
        digest = hashlib.sha256()
        for pairs in (self.train, self.validation, self.test):
            digest.update(pairs.images.contiguous().numpy().data)
            for task in ("left", "right"):
                digest.update(pairs.labels[task].to(torch.uint8).numpy().data)
        return {
            "name": "multimnist",
            "source": self.source,
            "size": self.size,
            "resize": "none" if self.size == CANVAS else "nearest, floor((i + 1/2) * 36 / 28)",
            "seed": self.seed,
            "counts": {
                "train": len(self.train),
                "validation": len(self.validation),
                "test": len(self.test),
            },
            "sha256": digest.hexdigest(),
        }


def compose(
    images: npt.NDArray[np.uint8], partners: npt.NDArray[np.int64], size: int = 28
) -> npt.NDArray[np.uint8]:
    """Lay digit ``partners[n]`` over digit n, for every n.

    Args:
        images: uint8 [N, 28, 28].
        partners: int64 [N], positions in ``images``.
        size: 28 (nearest neighbour) or 36 (the whole canvas).

    Returns:
        uint8 [N, size, size].

    Raises:
        ValueError: ``size`` is neither 28 nor 36.

    Example:
        >>> import numpy as np
        >>> images = np.stack([np.full((28, 28), 10, np.uint8), np.full((28, 28), 200, np.uint8)])
        >>> composites = compose(images, np.array([1, 0]), size=36)
        >>> composites[0, [0, 6, 33, 34], [0, 6, 33, 34]].tolist()
        [10, 200, 200, 0]
    """
    keep = _kept_pixels(size)
    composites = np.empty((len(images), size, size), dtype=np.uint8)
    for start in range(0, len(images), _CHUNK):
        part = slice(start, start + _CHUNK)
        canvas = np.zeros((len(partners[part]), CANVAS, CANVAS), dtype=np.uint8)
        canvas[:, _LEFT, _LEFT] = images[part]
        right = canvas[:, _RIGHT, _RIGHT]
        np.maximum(right, images[partners[part]], out=right)
        composites[part] = canvas[:, keep[:, None], keep]
    return composites


def _kept_pixels(size: int) -> npt.NDArray[np.int64]:
    """Rows (and columns) of the canvas that remain; in whole numbers, so that nothing is rounded."""
    if size == CANVAS:
        return np.arange(CANVAS)
    if size == 28:
        return (2 * np.arange(size) + 1) * CANVAS // (2 * size)
    raise ValueError(f"size is {size}: MultiMNIST images have 28 (nearest neighbour) or 36 (canvas) pixels")


def load_multimnist(
    data_dir: Path | str | None = None, *, size: int = 28, seed: int = 0, download: bool = False
) -> MultiDigits:
    """Load MNIST and compose the training, validation and test images.

    Args:
        data_dir: folder with the four original MNIST files, plain or gzip; None: the digits inside the
            package. See :func:`detente.data.mnist.load_digits`.
        size: side of the images, 28 or 36.
        seed: seed of the partners. The division into splits is fixed and does not depend on it.
        download: fetch missing files into ``data_dir`` with torchvision.

    Returns:
        55 000 / 5000 / 10 000 composites from files, 10 000 / 5000 / 5000 from the package.

    Raises:
        ValueError: ``size`` or ``seed`` is out of range, or a file is damaged, swapped or foreign.
        FileNotFoundError: the folder or some of its files are missing.
        ImportError: ``download`` without torchvision.
        ConnectionError: torchvision could not fetch the files.

    Example:
        >>> digits = load_multimnist(size=36).take(100)
        >>> images, labels = digits.train.batch([0, 5, 7])
        >>> images.shape, images.dtype, sorted(labels)
        (torch.Size([3, 1, 36, 36]), torch.float32, ['left', 'right'])
    """
    _kept_pixels(size)
    seed = check_seed(seed)
    digits = load_digits(data_dir, download=download)
    return MultiDigits(
        train=_pair(digits.train, "train", size, seed),
        validation=_pair(digits.validation, "validation", size, seed),
        test=_pair(digits.test, "test", size, seed),
        source=digits.source,
        size=size,
        seed=seed,
    )


def _pair(digits: Digits, split: str, size: int, seed: int) -> DigitPairs:
    partners = random_integers(seed, _STREAMS[split], below=len(digits), count=len(digits))
    labels = torch.from_numpy(digits.labels.astype(np.int64))
    return DigitPairs(
        images=torch.from_numpy(compose(digits.images, partners, size)),
        labels={"left": labels, "right": labels[torch.from_numpy(partners)]},
    )
