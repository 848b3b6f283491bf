"""Runs the benchmarks of this folder, one after the other."""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
import sys
import time

import numpy
import torch

import benchmarks


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all of them; 2 if a name is unknown."""
    known = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_")]
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"no benchmark named {unknown[0]!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}, "
        f"{os.cpu_count()} cores, {platform.machine()}"
    )
    for name in names or known:
        start = time.perf_counter()
        print(f"\n== {name}", flush=True)
        importlib.import_module(f"benchmarks.{name}").main()
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
