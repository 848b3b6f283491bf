"""Runs the benchmarks of this folder, one after the other; ``--page FILE`` also writes what they print as a page.

A page that exists keeps the sections of benchmarks that were not run. ``--base REV`` names the commit with which those
compare that look at another one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import os
import pkgutil
import platform
import re
import sys
import time
from pathlib import Path

import numpy
import torch

import benchmarks

HEADER = """# Benchmarks

Made by `python -m benchmarks --page docs/benchmarks.md` (`make bench` prints the same). Whatever is compared is
measured in turns on the same machine; medians are shown with the range of the ratios. Seconds depend on the machine,
ratios much less. What is promised and not kept is explained at the end.
"""


class _Tee(io.StringIO):
    """Shows what is printed while it is kept."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]
        return super().write(text)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _sections(page: Path) -> dict[str, str]:
    """The sections of a page by the name of their benchmark."""
    parts = re.split(r"^(?=## )", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        part[3:].split("\n", 1)[0].strip(): part.rstrip() + "\n" for part in parts if part.startswith("## ")
    }


def main(arguments: list[str]) -> int:
    """Run the named benchmarks, or all of them; 2 if a name is unknown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="benchmarks to run (default: all)")
    parser.add_argument("--page", type=Path, help="also write a page in Markdown")
    parser.add_argument(
        "--base", metavar="REV", help="commit to compare with (default: each benchmark's own)"
    )
    options = parser.parse_args(arguments)
    known = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_")]
    unknown = [name for name in options.names if name not in known]
    if unknown:
        print(f"no benchmark named {unknown[0]!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    machine = (
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}, "
        f"{os.cpu_count()} cores, {_processor()}, {torch.get_num_threads()} threads"
    )
    print(machine)
    sections = _sections(options.page) if options.page is not None and options.page.exists() else {}
    for name in options.names or known:
        module = importlib.import_module(f"benchmarks.{name}")
        start = time.perf_counter()
        print(f"\n== {name}", flush=True)
        with contextlib.redirect_stdout(_Tee()) as kept:
            takes_base = options.base is not None and "base" in inspect.signature(module.main).parameters
            module.main(**({"base": options.base} if takes_base else {}))
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)
        told = f"{(module.__doc__ or '').strip()}\n\n```text\n{kept.getvalue().rstrip()}\n```"
        sections[name] = f"## {name}\n\n{told}\n\nMeasured with {machine}.\n"
    notes = Path(__file__).with_name("notes.md").read_text(encoding="utf-8")
    page = [HEADER, *(sections[name] for name in known if name in sections), notes]
    if options.page is not None:
        temporary = options.page.with_suffix(".tmp")
        temporary.write_text("\n".join(page), encoding="utf-8")
        temporary.replace(options.page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
