"""Which versions a run was made with."""

from __future__ import annotations

import importlib.metadata
import platform
import sys


def versions() -> dict[str, str]:
    """Versions of detente, torch, numpy, Python and the platform, as texts.

    Read from the installed packages' metadata, so nothing heavy is imported. A package that is not
    installed (a source tree on the path) is asked for its ``__version__``; else ``"unknown"``.

    >>> sorted(versions())
    ['detente', 'numpy', 'platform', 'python', 'torch']
    """
    return {
        "detente": _version("detente"),
        "torch": _version("torch"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))
