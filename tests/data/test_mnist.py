"""The digits: inside the package, and from four files that are written here or are the real ones.

Set the environment variable DETENTE_MNIST to a folder with the original MNIST files to run the tests that
need all of them.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import runpy
import struct
import subprocess
import sys
import types
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detente.data import mnist
from detente.data.mnist import Digits, DigitSplits, load_digits, split_positions

FOLDER = os.environ.get("DETENTE_MNIST")
needs_files = pytest.mark.skipif(
    FOLDER is None, reason="needs the four MNIST files: set DETENTE_MNIST to their folder"
)
NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
SPLITS = ("train", "validation", "test")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_mnist_sample.py"
PINNED_SPLITS = "dd70ee3610a24c898d3cfdf434d13763e09c56112d373f50af25a0967dd51b04"
PINNED_COUNTS = {
    "train": [1013, 1076, 995, 1028, 967, 923, 1039, 1076, 964, 919],
    "validation": [509, 606, 505, 509, 493, 432, 494, 509, 474, 469],
    "test": [503, 578, 495, 495, 505, 447, 490, 506, 465, 516],
}


# --- the sample inside the package ---


def sample_bytes() -> bytes:
    return resources.files("detente.data").joinpath("sample", "mnist-sample.npz").read_bytes()


def test_the_sample_is_small_and_holds_no_pickle() -> None:
    packed = sample_bytes()
    assert len(packed) < 5_000_000
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        assert sorted(archive.namelist()) == sorted(
            f"{s}_{k}.npy" for s in SPLITS for k in ("images", "labels")
        )
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        assert all(arrays[name].dtype == np.uint8 for name in arrays.files)


def test_the_sample_has_the_promised_digits() -> None:
    digits = load_digits()
    assert digits.source == "packaged"
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (10_000, 5_000, 5_000)
    for name in SPLITS:
        part: Digits = getattr(digits, name)
        assert part.images.shape == (len(part), 28, 28)
        counts = np.bincount(part.labels, minlength=10)
        assert counts.tolist() == PINNED_COUNTS[name]
        # What MNIST's makers did to every digit: full ink, centre of mass in the middle of the image.
        assert (part.images.reshape(len(part), -1).max(1) >= 254).all()
        ink = part.images / part.images.sum((1, 2), keepdims=True)
        rows, columns = ink.sum(2) @ np.arange(28), ink.sum(1) @ np.arange(28)
        assert abs(rows - 14).max() < 1
        assert abs(columns - 14).max() < 1


def test_no_digit_is_in_two_parts_of_the_sample() -> None:
    digits = load_digits()
    seen = [{image.tobytes() for image in getattr(digits, name).images} for name in SPLITS]
    assert [len(images) for images in seen] == [10_000, 5_000, 5_000]
    assert len(seen[0] | seen[1] | seen[2]) == 20_000


def test_the_licence_of_the_data_is_beside_it() -> None:
    folder = resources.files("detente.data").joinpath("sample")
    licence = folder.joinpath("LICENSE.txt").read_text("utf-8")
    for words in ("CC BY-SA 3.0", "Yann LeCun", "Corinna Cortes", "Burges", "Changes:"):
        assert words in licence
    assert "CC BY-SA 3.0" in folder.joinpath("README.md").read_text("utf-8")


def test_a_damaged_or_missing_sample_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sample").mkdir()
    monkeypatch.setattr(mnist.resources, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"mnist-sample\.npz are missing"):
        load_digits()
    packed = bytearray(sample_bytes_unpatched)
    packed[len(packed) // 2] ^= 1
    (tmp_path / "sample" / "mnist-sample.npz").write_bytes(packed)
    with pytest.raises(ValueError, match=r"mnist-sample\.npz are damaged.*install detente again"):
        load_digits()


sample_bytes_unpatched = sample_bytes()


# --- the division into splits ---


def test_splits_cover_everything_once() -> None:
    positions = split_positions()
    training = np.concatenate([positions["train"], positions["validation"]])
    assert sorted(training.tolist()) == list(range(60_000))
    assert sorted(positions["test"].tolist()) == list(range(10_000))
    assert len(positions["validation"]) == 5_000


def test_splits_never_change() -> None:
    digest = hashlib.sha256()
    for name in SPLITS:
        digest.update(split_positions()[name].astype("<i8").tobytes())
    assert digest.hexdigest() == PINNED_SPLITS


# --- four files, generated: 40 training (8 of them for validation) and 12 test digits ---


def idx(array: np.ndarray[Any, Any]) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The bytes of four small files, which are made the known ones."""
    noise = np.random.default_rng(5)
    arrays = {
        NAMES[0]: noise.integers(0, 256, (40, 28, 28), dtype=np.uint8),
        NAMES[1]: noise.integers(0, 10, 40, dtype=np.uint8),
        NAMES[2]: noise.integers(0, 256, (12, 28, 28), dtype=np.uint8),
        NAMES[3]: noise.integers(0, 10, 12, dtype=np.uint8),
    }
    files = {name: idx(array) for name, array in arrays.items()}
    known = {
        name: mnist._Known(arrays[name].shape, len(data), hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    }
    monkeypatch.setattr(mnist, "_FILES", known)
    monkeypatch.setattr(mnist, "TRAINING_DIGITS", 40)
    monkeypatch.setattr(mnist, "VALIDATION_DIGITS", 8)
    monkeypatch.setattr(mnist, "TEST_DIGITS", 12)
    return files


def write_all(folder: Path, contents: dict[str, bytes], packed: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        if name in packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)
    return folder


def assert_digits_come_from(digits: DigitSplits, contents: dict[str, bytes]) -> None:
    """Cut every digit out of the files' bytes by hand."""
    assert digits.source == "files"
    positions = split_positions()
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (32, 8, 12)
    for split in SPLITS:
        images, labels = (contents[n] for n in (NAMES[2:] if split == "test" else NAMES[:2]))
        part: Digits = getattr(digits, split)
        for n, position in enumerate(positions[split].tolist()):
            start = 16 + position * 784
            assert part.images[n].tobytes() == images[start : start + 784]
            assert part.labels[n] == labels[8 + position]


@pytest.mark.parametrize("packed", [(), NAMES, NAMES[1:3]])
@pytest.mark.parametrize("below", [".", "MNIST/raw"])
def test_plain_packed_and_mixed_files(
    tmp_path: Path, contents: dict[str, bytes], packed: tuple[str, ...], below: str
) -> None:
    write_all(tmp_path / below, contents, packed)
    assert_digits_come_from(load_digits(tmp_path), contents)
    assert_digits_come_from(load_digits(str(tmp_path), download=True), contents)  # nothing left to fetch


def test_a_changed_byte_is_found(tmp_path: Path, contents: dict[str, bytes]) -> None:
    changed = bytearray(contents[NAMES[2]])
    changed[100] ^= 1
    write_all(tmp_path, contents | {NAMES[2]: bytes(changed)})
    with pytest.raises(ValueError, match=rf"{NAMES[2]} has the size .*damaged or belongs to another"):
        load_digits(tmp_path)


def test_a_cut_file_is_found(tmp_path: Path, contents: dict[str, bytes]) -> None:
    write_all(tmp_path, contents | {NAMES[0]: contents[NAMES[0]][:-5]})
    with pytest.raises(ValueError, match=rf"{NAMES[0]} is cut short"):
        load_digits(tmp_path)


@pytest.mark.parametrize(("first", "second"), [(0, 2), (1, 3), (0, 1)])
def test_swapped_files_are_found(tmp_path: Path, contents: dict[str, bytes], first: int, second: int) -> None:
    a, b = NAMES[first], NAMES[second]
    write_all(tmp_path, contents | {a: contents[b], b: contents[a]})
    with pytest.raises(ValueError, match=rf"{a} holds the content of {b}: the files are swapped"):
        load_digits(tmp_path)


def test_another_array_is_found(tmp_path: Path, contents: dict[str, bytes]) -> None:
    write_all(tmp_path, contents | {NAMES[1]: idx(np.zeros(41, np.uint8))})
    with pytest.raises(ValueError, match=rf"{NAMES[1]} holds an array of shape \(41,\)"):
        load_digits(tmp_path)


def test_missing_files_are_all_named(tmp_path: Path, contents: dict[str, bytes]) -> None:
    write_all(tmp_path, {name: contents[name] for name in NAMES[:2]})
    with pytest.raises(FileNotFoundError, match=f"lacks {NAMES[2]}, {NAMES[3]} .*download=True"):
        load_digits(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no data folder .*elsewhere"):
        load_digits(tmp_path / "elsewhere")


# --- fetching ---


def fake_torchvision(monkeypatch: pytest.MonkeyPatch, fetch: Any) -> None:
    package, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    datasets.MNIST = fetch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def test_download_goes_through_torchvision(
    tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fetch(root: str, train: bool, download: bool) -> None:
        calls.append((root, download))
        write_all(Path(root) / "MNIST" / "raw", contents, packed=NAMES[:1])

    fake_torchvision(monkeypatch, fetch)
    target = tmp_path / "new"
    assert_digits_come_from(load_digits(target, download=True), contents)
    assert_digits_come_from(load_digits(target, download=True), contents)
    assert calls == [(str(target), True)]  # the second time the files are there


def test_download_without_torchvision(
    tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"needs torchvision.*detente\[vision\]"):
        load_digits(tmp_path, download=True)


def test_download_that_fails(
    tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(root: str, train: bool, download: bool) -> None:
        raise RuntimeError("no route")

    fake_torchvision(monkeypatch, fetch)
    with pytest.raises(ConnectionError, match=r"could not fetch MNIST.*no route"):
        load_digits(tmp_path, download=True)


def test_download_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="needs data_dir"):
        load_digits(download=True)


# --- the value ---


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 27, 28), np.uint8), np.zeros(2, np.uint8), "images are uint8"),
        (np.zeros((2, 28, 28), np.float32), np.zeros(2, np.uint8), "images are float32"),
        (np.zeros((2, 28, 28), np.uint8), np.zeros(3, np.uint8), "labels are uint8"),
        (np.zeros((2, 28, 28), np.uint8), np.zeros(2, np.int64), "labels are int64"),
        (np.zeros((2, 28, 28), np.uint8), np.array([1, 10], np.uint8), "label 10"),
    ],
)
def test_digits_check_themselves(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(images, labels)


# --- the real files ---


@needs_files
def test_real_files_have_the_published_label_counts() -> None:
    digits = load_digits(FOLDER)
    counts = np.bincount(digits.train.labels, minlength=10) + np.bincount(
        digits.validation.labels, minlength=10
    )
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (55_000, 5_000, 10_000)


@needs_files
def test_the_sample_is_the_beginning_of_the_real_splits() -> None:
    sample, full = load_digits(), load_digits(FOLDER)
    for name in SPLITS:
        part, whole = getattr(sample, name), getattr(full, name)
        assert np.array_equal(part.images, whole.images[: len(part)])
        assert np.array_equal(part.labels, whole.labels[: len(part)])


@needs_files
def test_the_script_writes_the_sample_again(tmp_path: Path) -> None:
    out = tmp_path / "again" / "sample.npz"
    command = [sys.executable, str(SCRIPT), "--data-dir", str(FOLDER), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert f"{out.stat().st_size} bytes" in done.stdout
    assert [p.name for p in out.parent.iterdir()] == ["sample.npz"]
    with np.load(out, allow_pickle=False) as again, np.load(io.BytesIO(sample_bytes())) as shipped:
        assert again.files == shipped.files
        for name in shipped.files:
            assert np.array_equal(again[name], shipped[name])


def test_packing_is_deterministic() -> None:
    pack = runpy.run_path(str(SCRIPT))["pack"]
    arrays = {"a": np.arange(6, dtype=np.uint8).reshape(2, 3), "b": np.zeros(0, np.uint8)}
    packed = pack(arrays)
    assert packed == pack(arrays)
    with np.load(io.BytesIO(packed), allow_pickle=False) as back:
        assert all(np.array_equal(back[name], arrays[name]) for name in arrays)
