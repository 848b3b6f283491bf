"""MultiMNIST: every pixel by slow loops on real digits, and checksums that must never change."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from detente.data import multimnist
from detente.data.mnist import load_digits
from detente.data.multimnist import DigitPairs, MultiDigits, compose, load_multimnist

FOLDER = os.environ.get("DETENTE_MNIST")
needs_files = pytest.mark.skipif(
    FOLDER is None, reason="needs the four MNIST files: set DETENTE_MNIST to their folder"
)
SPLITS = ("train", "validation", "test")
PINNED = {
    28: "c1b0ffbf09b0b5d520b0ae9a364009e71b3f6ae8887e619f5ce14cf65dea3306",
    36: "973489d6485f978f61859e915ad7414710d04bd4a767205a94ce129cf2ff452f",
}
PINNED_FILES = {
    28: "e3b365dcce2591b4e1d11103738253eec05a18d0b7ae0353c8f3adb1bb7286bf",
    36: "aeb014a8bf4d6a8d5ec09198c8dcb7202b4ba28341d1b78a0d05ffd715be0189",
}


@pytest.fixture(scope="module")
def packaged() -> dict[int, MultiDigits]:
    return {size: load_multimnist(size=size) for size in (28, 36)}


def slow_partner(seed: int, split: str, digits: int, position: int) -> int:
    """The partner by the documented rule, one raw number at a time."""
    stream = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(1, SPLITS.index(split))))
    raw = [int(stream.random_raw()) for _ in range(position + 1)][position]
    return (raw >> 32) * digits >> 32


def slow_canvas(left: Any, right: Any) -> list[list[int]]:
    canvas = [[0] * 36 for _ in range(36)]
    for row in range(28):
        for column in range(28):
            canvas[row][column] = int(left[row, column])
    for row in range(28):
        for column in range(28):
            here = canvas[row + 6][column + 6]
            canvas[row + 6][column + 6] = max(here, int(right[row, column]))
    return canvas


@pytest.mark.parametrize("split", SPLITS)
def test_every_pixel_by_slow_loops(packaged: dict[int, MultiDigits], split: str) -> None:
    digits = getattr(load_digits(), split)
    for position in (0, 1, 2, 17, 400, 4095, 4096, 4999):
        partner = slow_partner(0, split, len(digits), position)
        canvas = slow_canvas(digits.images[position], digits.images[partner])
        whole, small = (getattr(packaged[size], split) for size in (36, 28))
        assert whole.images[position].tolist() == canvas
        # The source pixel is the one that contains the centre (i + 1/2) * 36 / 28 of pixel i.
        for i in range(28):
            for j in range(28):
                source = canvas[int((i + 0.5) * 36 / 28)][int((j + 0.5) * 36 / 28)]
                assert int(small.images[position, i, j]) == source
        for pairs in (whole, small):
            assert int(pairs.labels["left"][position]) == digits.labels[position]
            assert int(pairs.labels["right"][position]) == digits.labels[partner]


def test_small_images_equal_those_of_an_imaging_library(packaged: dict[int, MultiDigits]) -> None:
    """The library whose nearest-neighbour resizing the paper's code calls."""
    imaging = pytest.importorskip("PIL.Image", reason="needs pillow")
    for canvas, small in zip(packaged[36].test.images[:200], packaged[28].test.images[:200], strict=True):
        resized = imaging.fromarray(canvas.numpy()).resize((28, 28), imaging.Resampling.NEAREST)
        assert np.array_equal(np.asarray(resized), small.numpy())


def test_a_digit_may_meet_itself() -> None:
    image = load_digits().train.images[:1]
    (composite,) = compose(image, np.array([0]), size=36)
    assert composite.tolist() == slow_canvas(image[0], image[0])


def test_partners_are_uniform_over_the_split_and_differ_between_splits() -> None:
    drawn = {
        split: multimnist.random_integers(0, multimnist._STREAMS[split], below=5000, count=5000)
        for split in SPLITS
    }
    for partners in drawn.values():
        assert partners.min() >= 0
        assert partners.max() < 5000
        # Drawn with replacement, a share 1 - 1/e of all digits is met at least once.
        assert abs(len(set(partners.tolist())) / 5000 - (1 - np.exp(-1))) < 0.02
        assert not np.array_equal(partners, np.arange(5000))
    assert len({tuple(partners.tolist()) for partners in drawn.values()}) == 3


@pytest.mark.parametrize("size", [28, 36])
def test_packaged_composites_never_change(packaged: dict[int, MultiDigits], size: int) -> None:
    assert packaged[size].describe()["sha256"] == PINNED[size]


@needs_files
@pytest.mark.parametrize("size", [28, 36])
def test_composites_of_all_digits_never_change(size: int) -> None:
    digits = load_multimnist(FOLDER, size=size)
    description = digits.describe()
    assert description["source"] == "files"
    assert description["counts"] == {"train": 55_000, "validation": 5_000, "test": 10_000}
    assert description["sha256"] == PINNED_FILES[size]


def test_another_process_with_other_surroundings_sees_the_same() -> None:
    code = (
        "import numpy, torch; numpy.random.seed(9); torch.manual_seed(9)\n"
        "from detente.data import load_multimnist\n"
        "print(load_multimnist().describe()['sha256'])"
    )
    surroundings = os.environ | {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "2"}
    surroundings["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.strip() == PINNED[28]


def test_loading_leaves_global_generators_alone() -> None:
    before = torch.get_rng_state()
    load_multimnist(seed=4)
    assert torch.equal(before, torch.get_rng_state())


def test_the_seed_changes_partners_only(packaged: dict[int, MultiDigits]) -> None:
    other = load_multimnist(seed=1)
    for split in SPLITS:
        first, second = getattr(packaged[28], split), getattr(other, split)
        assert torch.equal(first.labels["left"], second.labels["left"])
        same = (first.labels["right"] == second.labels["right"]).float().mean()
        assert 0.07 < same < 0.13  # two independent draws agree for about a tenth
    assert other.describe()["sha256"] != packaged[28].describe()["sha256"]
    assert other.describe()["seed"] == 1


# --- batches and descriptions ---


@pytest.mark.parametrize("size", [28, 36])
def test_batches_are_normalised(packaged: dict[int, MultiDigits], size: int) -> None:
    pairs = packaged[size].validation
    indices = [4, 0, 4, 4999]
    images, labels = pairs.batch(indices)
    assert images.shape == (4, 1, size, size)
    assert images.dtype == torch.float32
    pixels = pairs.images.numpy()[indices].astype(np.float64)
    assert np.allclose(images[:, 0].numpy(), (pixels / 255 - 0.1307) / 0.3081, rtol=0, atol=1e-6)
    assert {task: values.tolist() for task, values in labels.items()} == {
        task: [int(pairs.labels[task][i]) for i in indices] for task in ("left", "right")
    }
    assert all(values.dtype == torch.int64 for values in labels.values())


def test_every_kind_of_index_gives_the_same_batch(packaged: dict[int, MultiDigits]) -> None:
    pairs = packaged[28].train
    before = pairs.images[3:9].clone()
    batches = [pairs.batch(w) for w in (slice(3, 9), range(3, 9), list(range(3, 9)), torch.arange(3, 9))]
    for images, labels in batches:
        assert torch.equal(images, batches[0][0])
        assert torch.equal(labels["right"], pairs.labels["right"][3:9])
    assert torch.equal(pairs.images[3:9], before)
    assert pairs.batch([])[0].shape == (0, 1, 28, 28)
    with pytest.raises(IndexError):
        pairs.batch([10_000])


def test_taking_a_few(packaged: dict[int, MultiDigits]) -> None:
    few = packaged[28].take(7)
    for split in SPLITS:
        assert len(getattr(few, split)) == 7
        assert torch.equal(getattr(few, split).images, getattr(packaged[28], split).images[:7])
        assert len(getattr(few, split).labels["left"]) == 7
    assert few.describe()["counts"] == {"train": 7, "validation": 7, "test": 7}
    assert len(few.train.take(100)) == 7
    with pytest.raises(ValueError, match="at least 1"):
        few.train.take(0)


def test_descriptions_fit_into_json_and_notice_one_pixel(packaged: dict[int, MultiDigits]) -> None:
    few = packaged[36].take(3)
    description = few.describe()
    assert json.loads(json.dumps(description)) == description
    assert description | {"sha256": ""} == {
        "name": "multimnist",
        "source": "packaged",
        "size": 36,
        "resize": "none",
        "seed": 0,
        "counts": {"train": 3, "validation": 3, "test": 3},
        "sha256": "",
    }
    assert "1/2" in str(packaged[28].describe()["resize"])
    changed = few.test.images.clone()
    changed[2, 35, 35] += 1
    other = dataclasses.replace(few, test=DigitPairs(changed, few.test.labels))
    assert other.describe()["sha256"] != description["sha256"]
    labels = {**few.test.labels, "right": (few.test.labels["right"] + 1) % 10}
    other = dataclasses.replace(few, test=DigitPairs(few.test.images, labels))
    assert other.describe()["sha256"] != description["sha256"]


def test_splits_are_frozen(packaged: dict[int, MultiDigits]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        packaged[28].train.images = torch.zeros(1)  # type: ignore[misc]


# --- bad input ---


@pytest.mark.parametrize("size", [0, 27, 32, 56])
def test_other_sizes_are_refused_before_files_are_read(size: int) -> None:
    with pytest.raises(ValueError, match=f"size is {size}: .*28.*36"):
        load_multimnist("nowhere", size=size)


@pytest.mark.parametrize("seed", [-1, 0.5, True])
def test_bad_seeds_are_refused_before_files_are_read(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed is"):
        load_multimnist("nowhere", seed=seed)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_multimnist("nowhere")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 28, 28), torch.zeros(2).long(), "composites are torch.float32"),
        (torch.zeros(2, 1, 28, 28).byte(), torch.zeros(2).long(), "composites are"),
        (torch.zeros(2, 28, 28).byte(), torch.zeros(3).long(), "task 'left'"),
        (torch.zeros(2, 28, 28).byte(), torch.zeros(2), "task 'left' are torch.float32"),
    ],
)
def test_pairs_check_themselves(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitPairs(images, {"left": labels})
