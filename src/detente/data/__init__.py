"""Data sets: one file for each, read without unpickling anything."""

from detente.data.idx import read_idx
from detente.data.mnist import Digits, DigitSplits, load_digits
from detente.data.multimnist import DigitPairs, MultiDigits, load_multimnist

__all__ = [
    "DigitPairs",
    "DigitSplits",
    "Digits",
    "MultiDigits",
    "load_digits",
    "load_multimnist",
    "read_idx",
]
