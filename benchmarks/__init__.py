"""Measurements: `python -m benchmarks` runs all, `python -m benchmarks NAME ...` some.

A benchmark is a module of this folder with a function `main()` that prints a table; a leading underscore
marks a module that only helps others. Whatever is compared is measured in turns (A, B, A, B, ...), so that
a busy minute of the machine favours neither; medians are printed with their spread.
"""
