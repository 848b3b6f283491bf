"""IDX files: every element type, and every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detente.data.idx import read_idx, read_idx_content

# Element type byte, struct code, values that use the sign and both ends of the range.
TYPES = [
    (0x08, "B", [0, 1, 128, 255, 7, 9]),
    (0x09, "b", [0, -1, -128, 127, 7, 9]),
    (0x0B, "h", [0, -2, -32768, 32767, 258, 9]),
    (0x0C, "i", [0, -2, -(2**31), 2**31 - 1, 16909060, 9]),
    (0x0D, "f", [0.0, -1.5, 3e38, 1e-38, 0.25, 9.0]),
    (0x0E, "d", [0.0, -1.5, 1e300, 1e-300, 0.1, 9.0]),
]


def idx_bytes(code: int, letter: str, shape: tuple[int, ...], values: list[float]) -> bytes:
    """Write IDX with struct, one number after the other."""
    return struct.pack(f">BBBB{len(shape)}I{len(values)}{letter}", 0, 0, code, len(shape), *shape, *values)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("code", "letter", "values"), TYPES)
def test_every_element_type(
    tmp_path: Path, code: int, letter: str, values: list[float], packed: bool
) -> None:
    content = idx_bytes(code, letter, (3, 1, 2), values)
    # The name says nothing: a plain file may end in .gz and a gzip file may not.
    path = write(tmp_path / ("data" if packed else "data.gz"), gzip.compress(content) if packed else content)
    array = read_idx(path)
    assert array.shape == (3, 1, 2)
    assert array.dtype == np.dtype(letter).newbyteorder("=")
    expected = [struct.unpack(">f", struct.pack(">f", v))[0] if letter == "f" else v for v in values]
    assert array.ravel().tolist() == expected
    array[0, 0, 0] = 1  # writable
    facts = read_idx_content(path)
    assert (facts.size, facts.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_no_elements_are_allowed(tmp_path: Path) -> None:
    assert read_idx(write(tmp_path / "empty", idx_bytes(8, "B", (0, 28, 28), []))).shape == (0, 28, 28)


GOOD = idx_bytes(8, "B", (2, 3), [1, 2, 3, 4, 5, 6])
BROKEN = {
    "nothing": (b"", "cut short"),
    "three bytes": (GOOD[:3], "cut short"),
    "half a header": (GOOD[:9], "cut short inside its header"),
    "half the data": (GOOD[:-1], "is cut short: 5 bytes of data where its header promises 6"),
    "left over": (GOOD + b"x", "bytes left over"),
    "another magic": (b"\x89PNG" + GOOD, "not an IDX file.*89 50 4e 47"),
    "an unknown type": (b"\0\0\x0a\1" + GOOD[4:], "not an IDX file"),
    "no axes": (b"\0\0\x08\0" + GOOD[4:], "not an IDX file"),
    "too many axes": (b"\0\0\x08\xff" + GOOD[4:], "not an IDX file"),
    "impossible axes": (idx_bytes(8, "B", (0, 2**32 - 1, 2**32 - 1, 2**32 - 1), []), "impossible shape"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_named(tmp_path: Path, what: str, packed: bool) -> None:
    content, message = BROKEN[what]
    path = write(tmp_path / "digits-file", gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=f"(?s)digits-file.*{message}|{message}.*digits-file"):
        read_idx(path)


@pytest.mark.parametrize("cut", [3, 12, -9, -1])
def test_a_cut_gzip_file_is_named(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "digits.gz", gzip.compress(GOOD)[:cut])
    with pytest.raises(ValueError, match=r"digits\.gz.*(damaged|cut short)"):
        read_idx(path)


def test_a_gzip_file_with_a_wrong_bit_is_named(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(idx_bytes(8, "B", (200,), [i * 37 % 251 for i in range(200)])))
    content[len(content) // 2] ^= 0x10
    with pytest.raises(ValueError, match=r"digits\.gz"):
        read_idx(write(tmp_path / "digits.gz", bytes(content)))


@pytest.mark.parametrize("packed", [False, True])
def test_a_header_that_lies_reserves_nothing(tmp_path: Path, packed: bool) -> None:
    content = struct.pack(">BBBB3I", 0, 0, 0x0E, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1) + b"12345678"
    path = write(tmp_path / "liar", gzip.compress(content) if packed else content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"liar.*cut short"):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_long_file_with_a_wrong_header_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "long", struct.pack(">BBBBI", 0, 0, 8, 1, 2**32 - 1))
    with path.open("r+b") as file:
        file.truncate(200 << 20)  # a hole that takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"long is cut short: 209715192 bytes"):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_decompression_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = write(tmp_path / "bomb", gzip.compress(idx_bytes(8, "B", (10,), [0] * 10) + bytes(100 << 20), 1))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"bomb.*left over"):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_idx(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a folder"):
        read_idx(tmp_path)


@given(
    content=st.binary(max_size=64), start=st.sampled_from([b"", b"\0\0\x08\1", b"\x1f\x8b", b"\0\0\x0d\2"])
)
def test_any_bytes_are_an_array_or_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, start: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise"
    path.write_bytes(start + content)
    try:
        array = read_idx(path)
    except ValueError:
        with pytest.raises(ValueError, match="noise"):
            read_idx(path)
    else:
        assert array.nbytes + 4 + 4 * array.ndim == len(start + content)
