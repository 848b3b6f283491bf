"""MNIST digits: the sample inside the package, or the four original files in a folder.

Both sources are divided in the same fixed way, which no seed changes, so that a digit held out for
validation is never trained on by another run:

* the 60 000 training digits are put into one fixed random order; the first 5000 are the validation
  digits, the other 55 000 the training digits;
* the 10 000 test digits are put into one fixed random order (the released order begins with the easier
  half).

The packaged sample is the beginning of these three: the first 10 000 training digits, all 5000 validation
digits and the first 5000 test digits.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from detente.data.idx import read_idx_content
from detente.data.streams import random_order

__all__ = ["DigitSplits", "Digits", "load_digits", "split_positions"]

TRAINING_DIGITS = 60_000
TEST_DIGITS = 10_000
VALIDATION_DIGITS = 5_000
SAMPLE_COUNTS = {"train": 10_000, "validation": 5_000, "test": 5_000}
SAMPLE_NAME = "mnist-sample.npz"
SAMPLE_SHA256 = "ff646c410825c2409e8c3087dace2f864dec223264f61373d35aa64080d07291"


class _Known(NamedTuple):
    """The decompressed content of one of the four original files."""

    shape: tuple[int, ...]
    size: int
    sha256: str


_FILES: dict[str, _Known] = {
    "train-images-idx3-ubyte": _Known(
        (60_000, 28, 28), 47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
    ),
    "train-labels-idx1-ubyte": _Known(
        (60_000,), 60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
    ),
    "t10k-images-idx3-ubyte": _Known(
        (10_000, 28, 28), 7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
    ),
    "t10k-labels-idx1-ubyte": _Known(
        (10_000,), 10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
    ),
}


@dataclass(frozen=True, eq=False)
class Digits:
    """Single digits.

    Attributes:
        images: uint8 [N, 28, 28], 0 for the background and 255 for full ink.
        labels: uint8 [N] from 0 to 9.

    Raises:
        ValueError: shapes, types or labels are not as above.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.images.ndim != 3 or self.images.shape[1:] != (28, 28) or self.images.dtype != np.uint8:
            raise ValueError(
                f"digit images are {self.images.dtype} {self.images.shape}: expected uint8 [N, 28, 28]"
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != np.uint8:
            raise ValueError(
                f"digit labels are {self.labels.dtype} {self.labels.shape}: expected uint8 "
                f"[{len(self.images)}], one for each image"
            )
        if len(self.labels) and int(self.labels.max()) > 9:
            raise ValueError(f"digit label {int(self.labels.max())}: expected 0 to 9")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class DigitSplits:
    """Training, validation and test digits.

    Attributes:
        train, validation, test: the digits.
        source: ``"packaged"`` (inside the package) or ``"files"`` (the four original files).
    """

    train: Digits
    validation: Digits
    test: Digits
    source: Literal["packaged", "files"]


def split_positions() -> dict[str, npt.NDArray[np.int64]]:
    """Give the positions, in the original files, of the digits of each split, in their order.

    Returns:
        ``train`` [55 000] and ``validation`` [5000] point into the 60 000 training digits, ``test``
        [10 000] into the test digits. The division is fixed: it has no seed.

    Example:
        >>> {name: len(positions) for name, positions in split_positions().items()}
        {'train': 55000, 'validation': 5000, 'test': 10000}
    """
    order = random_order(0, (0, 0), TRAINING_DIGITS)
    return {
        "train": order[VALIDATION_DIGITS:],
        "validation": order[:VALIDATION_DIGITS],
        "test": random_order(0, (0, 1), TEST_DIGITS),
    }


def load_digits(data_dir: Path | str | None = None, *, download: bool = False) -> DigitSplits:
    """Load MNIST from the package (``data_dir=None``) or from the four original files.

    Args:
        data_dir: folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
            ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, plain or with ``.gz``; torchvision's
            subfolder ``MNIST/raw`` is looked into as well. None: the sample inside the package.
        download: fetch missing files into ``data_dir`` with torchvision.

    Returns:
        55 000 training, 5000 validation and 10 000 test digits from files, or 10 000, 5000 and 5000 from
        the package.

    Raises:
        FileNotFoundError: the folder or some of the files are missing.
        ValueError: a file is damaged, swapped or belongs to another data set, or ``download`` is asked for
            without a folder.
        ImportError: ``download`` is asked for and torchvision is not installed.
        ConnectionError: torchvision could not fetch the files.

    Example:
        >>> digits = load_digits()
        >>> len(digits.train), digits.train.images.shape[1:]
        (10000, (28, 28))
    """
    if data_dir is None:
        if download:
            raise ValueError("download=True needs data_dir: the folder the MNIST files are written to")
        return _load_sample()
    folder = Path(data_dir)
    paths = _find_files(folder)
    if download and len(paths) < len(_FILES):
        _download(folder)
        paths = _find_files(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no data folder {folder}: name the folder that holds the four MNIST files, pass "
            "download=True, or leave data_dir out to use the digits inside the package"
        )
    missing = [name for name in _FILES if name not in paths]
    if missing:
        raise FileNotFoundError(
            f"data folder {folder} lacks {', '.join(missing)} (plain or with .gz): put the original MNIST "
            "files there, pass download=True, or leave data_dir out to use the digits inside the package"
        )
    arrays = {name: _read_known(paths[name], name) for name in _FILES}
    training = Digits(arrays["train-images-idx3-ubyte"], arrays["train-labels-idx1-ubyte"])
    test = Digits(arrays["t10k-images-idx3-ubyte"], arrays["t10k-labels-idx1-ubyte"])
    pools = {"train": training, "validation": training, "test": test}
    parts = {
        name: Digits(pools[name].images[positions], pools[name].labels[positions])
        for name, positions in split_positions().items()
    }
    return DigitSplits(parts["train"], parts["validation"], parts["test"], source="files")


def _find_files(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name in _FILES:
        for place in (folder, folder / "MNIST" / "raw"):
            for candidate in (place / name, place / f"{name}.gz"):
                if candidate.is_file():
                    found.setdefault(name, candidate)
    return found


def _read_known(path: Path, name: str) -> npt.NDArray[np.uint8]:
    """Read one of the four files and refuse anything but its known content."""
    known = _FILES[name]
    content = read_idx_content(path)
    if content.sha256 != known.sha256:
        twin = next((other for other, facts in _FILES.items() if facts.sha256 == content.sha256), None)
        if twin is not None:
            raise ValueError(f"{path} holds the content of {twin}: the files are swapped, rename them")
        if content.array.shape != known.shape or content.size != known.size:
            raise ValueError(
                f"{path} holds an array of shape {content.array.shape} ({content.size} bytes), MNIST's "
                f"{name} has shape {known.shape} ({known.size} bytes): put the original file there"
            )
        raise ValueError(
            f"{path} has the size of MNIST's {name} but another content (SHA-256 {content.sha256}, expected "
            f"{known.sha256}): it is damaged or belongs to another data set of the same layout, put the "
            "original file there"
        )
    return content.array


def _download(folder: Path) -> None:
    try:
        from torchvision.datasets import MNIST
    except ImportError as error:
        raise ImportError(
            "download=True needs torchvision, which is not installed: install detente[vision], or put the "
            f"four MNIST files into {folder} yourself"
        ) from error
    try:
        MNIST(root=str(folder), train=True, download=True)
    except (RuntimeError, OSError) as error:
        raise ConnectionError(
            f"torchvision could not fetch MNIST into {folder} ({error}): put the four files there yourself, "
            "or leave data_dir out to use the digits inside the package"
        ) from error


def _load_sample() -> DigitSplits:
    resource = resources.files("detente.data").joinpath("sample", SAMPLE_NAME)
    try:
        packed = resource.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the packaged digits {SAMPLE_NAME} are missing: install detente again, or pass data_dir"
        ) from error
    found = hashlib.sha256(packed).hexdigest()
    if found != SAMPLE_SHA256:
        raise ValueError(
            f"the packaged digits {SAMPLE_NAME} are damaged (SHA-256 {found}, expected {SAMPLE_SHA256}): "
            "install detente again, or pass data_dir"
        )
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        parts = {
            name: Digits(arrays[f"{name}_images"], arrays[f"{name}_labels"])
            for name in ("train", "validation", "test")
        }
    return DigitSplits(parts["train"], parts["validation"], parts["test"], source="packaged")
