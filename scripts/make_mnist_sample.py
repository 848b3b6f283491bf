"""Write the sample of MNIST that the package ships, from the four original files.

    python scripts/make_mnist_sample.py --data-dir FOLDER [--out FILE]

The sample is the beginning of the fixed splits of ``detente.data.mnist``. The same files give the same
arrays everywhere, and the same bytes with the same zlib. When the bytes change, put the printed SHA-256
into ``SAMPLE_SHA256`` there.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from detente.data.mnist import SAMPLE_COUNTS, SAMPLE_NAME, SAMPLE_SHA256, load_digits

SAMPLE_FOLDER = Path(__file__).resolve().parent.parent / "src" / "detente" / "data" / "sample"


def pack(arrays: Mapping[str, npt.NDArray[np.uint8]]) -> bytes:
    """Pack named arrays as the bytes of an ``.npz`` file without dates: equal arrays give equal bytes.

    The bytes also depend on the zlib that compresses; the arrays read back do not.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, member.getvalue(), zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def build(data_dir: Path) -> bytes:
    """Give the bytes of the sample drawn from the files in ``data_dir``."""
    digits = load_digits(data_dir)
    splits = {"train": digits.train, "validation": digits.validation, "test": digits.test}
    arrays = {}
    for name, count in SAMPLE_COUNTS.items():
        arrays[f"{name}_images"] = splits[name].images[:count]
        arrays[f"{name}_labels"] = splits[name].labels[:count]
    return pack(arrays)


def main() -> None:
    """Read the arguments, write the sample, print its size and checksum."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the four MNIST files")
    parser.add_argument("--out", type=Path, default=SAMPLE_FOLDER / SAMPLE_NAME, help="file to write")
    arguments = parser.parse_args()
    packed = build(arguments.data_dir)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.out.with_name(f".{arguments.out.name}.{os.getpid()}")
    try:
        temporary.write_bytes(packed)
        os.replace(temporary, arguments.out)
    finally:
        temporary.unlink(missing_ok=True)
    digest = hashlib.sha256(packed).hexdigest()
    verdict = "as pinned" if digest == SAMPLE_SHA256 else "NOT the pinned one: update SAMPLE_SHA256"
    print(f"{arguments.out.name}: {len(packed)} bytes, SHA-256 {digest} ({verdict})")


if __name__ == "__main__":
    main()
