"""One file per method; every file found here is registered.

What belongs here: a short class from task gradients (or only losses) to a combination, beside the contract (`base`),
the registry and the checks of options; `wrappers` holds the methods around methods. Mathematics that several methods
share belongs in `geometry`.
"""

from detente.methods.base import Declaration, Method
from detente.methods.registry import (
    UnknownMethod,
    UnknownOption,
    create,
    describe,
    discover,
    info_of,
    methods,
    register,
    unregister,
)

discover(__name__, __path__)

__all__ = [
    "Declaration",
    "Method",
    "UnknownMethod",
    "UnknownOption",
    "create",
    "describe",
    "info_of",
    "methods",
    "register",
    "unregister",
]
