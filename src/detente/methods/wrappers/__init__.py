"""Methods around methods: one file per kind; each is created by :func:`wrap` or by its class.

What belongs here: a wrapper, which is a method like any other (passed to ``backward`` and ``combine``, wrapped again,
saved and loaded) and declares what follows from the wrapped method's declaration.
"""

from detente.methods.wrappers.adaptive import Adaptive
from detente.methods.wrappers.base import Wrapper, WrapperInfo, register_wrapper, registered, wrap
from detente.methods.wrappers.guard import EarlyTerminationWarning, Guard, Inexact
from detente.methods.wrappers.normalize import Normalize
from detente.methods.wrappers.per_block import PerBlock
from detente.methods.wrappers.weights import Every, Smooth

__all__ = [
    "Adaptive",
    "EarlyTerminationWarning",
    "Every",
    "Guard",
    "Inexact",
    "Normalize",
    "PerBlock",
    "Smooth",
    "Wrapper",
    "WrapperInfo",
    "register_wrapper",
    "registered",
    "wrap",
]
