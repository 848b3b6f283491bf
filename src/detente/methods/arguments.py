"""Where ``one_of`` was; it is in :mod:`detente.methods.options`. No method lives here."""

from detente.methods.options import one_of

__all__ = ["one_of"]
