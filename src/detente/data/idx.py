"""Reading IDX files, the format of the original MNIST release.

An IDX file is two zero bytes, one byte for the element type, one byte for the number of axes, the
length of every axis as a big-endian 32-bit integer, and then the elements in row-major order, nothing
after them. Plain files and gzip files are told apart by their first bytes, never by their name.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["IdxContent", "read_idx", "read_idx_content"]

_ELEMENT_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 20
_MAX_AXES = 32


class IdxContent(NamedTuple):
    """An array read from an IDX file, with what is needed to recognise the file.

    ``size`` and ``sha256`` belong to the decompressed content, header included, so that a plain file and
    any gzip of it agree.
    """

    array: npt.NDArray[Any]
    size: int
    sha256: str


def read_idx(path: Path | str) -> npt.NDArray[Any]:
    """Read the array stored in an IDX file, plain or compressed with gzip.

    The length that the header promises is compared with what the file holds and is never used to reserve
    memory, so a damaged or hostile header costs nothing.

    Args:
        path: the file.

    Returns:
        A writable array in the machine's byte order, with the shape and element type of the header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not IDX, is cut short, has bytes left over, or its gzip stream is damaged.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "labels"
        ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
        ...     read_idx(path)
        array([7, 2, 1], dtype=uint8)
    """
    return read_idx_content(path).array


def read_idx_content(path: Path | str) -> IdxContent:
    """Read an IDX file, with what is needed to recognise it.

    Arguments and errors are those of :func:`read_idx`.

    Returns:
        The array, and size in bytes and SHA-256 of the decompressed content.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"IDX file {path} does not exist: check the folder and the file's name")
    if path.is_dir():
        raise ValueError(f"IDX file {path} is a folder: name the file itself")
    with path.open("rb") as raw:
        compressed = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        if not compressed:
            return _read_stream(raw, path, available=path.stat().st_size)
        with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
            try:
                return _read_stream(unpacked, path, available=None)
            except (EOFError, OSError, zlib.error) as error:
                raise ValueError(
                    f"gzip file {path} is damaged or cut short ({error}): fetch it again"
                ) from error


def _read_stream(stream: IO[bytes] | gzip.GzipFile, path: Path, available: int | None) -> IdxContent:
    """Read header and elements; ``available`` is the stream's length where it is known beforehand."""
    header = stream.read(4)
    if len(header) < 4:
        raise ValueError(f"IDX file {path} is cut short: it holds {len(header)} bytes, no complete header")
    if header[:2] != b"\x00\x00" or header[2] not in _ELEMENT_TYPES or not 1 <= header[3] <= _MAX_AXES:
        raise ValueError(
            f"{path} is not an IDX file: it starts with the bytes {header.hex(' ')}, expected 00 00, an "
            f"element type from 08 to 0e and 1 to {_MAX_AXES} axes"
        )
    lengths = stream.read(4 * header[3])
    if len(lengths) < 4 * header[3]:
        raise ValueError(f"IDX file {path} is cut short inside its header: fetch it again")
    shape = tuple(int(length) for length in np.frombuffer(lengths, dtype=">u4"))
    element = np.dtype(_ELEMENT_TYPES[header[2]])
    promised = math.prod(shape) * element.itemsize
    offset = len(header) + len(lengths)
    if available is not None and available != offset + promised:
        raise _wrong_length(path, shape, promised, available - offset)

    digest = hashlib.sha256(header + lengths)
    elements = bytearray()
    # One byte more than promised is asked for, which shows left-over bytes and ends a decompression bomb.
    while chunk := stream.read(min(_CHUNK, promised + 1 - len(elements))):
        elements += chunk
        digest.update(chunk)
    if len(elements) != promised:
        raise _wrong_length(path, shape, promised, len(elements))
    try:
        array = np.frombuffer(elements, dtype=element).reshape(shape)
    except ValueError as error:  # axes such as 0 x 4294967295 x 4294967295 that numpy cannot address
        raise ValueError(f"IDX file {path} declares the impossible shape {shape}: fetch it again") from error
    native = array.astype(element.newbyteorder("="), copy=False)
    return IdxContent(native, offset + promised, digest.hexdigest())


def _wrong_length(path: Path, shape: tuple[int, ...], promised: int, found: int) -> ValueError:
    problem = f"is cut short: {found} bytes" if found < promised else "has bytes left over: more than those"
    return ValueError(
        f"IDX file {path} {problem} of data where its header promises {promised} (shape {shape}): "
        "fetch it again"
    )
