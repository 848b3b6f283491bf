"""What `import detente` costs on top of `import torch` and numpy; at most 0.2 s is promised."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 7
LIMIT = 0.2

# Timed inside the process: the difference of two whole processes would drown in torch's own two seconds.
INSIDE = """
import time
import torch, numpy
start = time.perf_counter()
import detente
print(time.perf_counter() - start)
"""


def _inside() -> float:
    return float(
        subprocess.run([sys.executable, "-c", INSIDE], capture_output=True, text=True, check=True).stdout
    )


def _whole(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Print medians of interleaved runs, each in a fresh process."""
    inside, alone, both = [], [], []
    _whole("import torch, numpy, detente")  # writes bytecode and fills the disk cache
    for _ in range(RUNS):
        inside.append(_inside())
        alone.append(_whole("import torch, numpy"))
        both.append(_whole("import torch, numpy, detente"))
    ratio = statistics.median(b / a for a, b in zip(alone, both, strict=True))
    added = statistics.median(inside)
    print(f"torch, numpy                      {statistics.median(alone):6.3f} s")
    print(f"torch, numpy, detente             {statistics.median(both):6.3f} s ({ratio:.3f} times)")
    print(f"import detente, in the process  {added:6.3f} s ({min(inside):.3f} to {max(inside):.3f})")
    print(f"promised: at most {LIMIT} s: {'kept' if added <= LIMIT else 'NOT KEPT'}")
