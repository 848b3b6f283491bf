"""Stored runs: their schema, versions, atomic writing, and reading that is tolerant but strict.

Everything a report shows comes from these files, so they are the truth about a run.
"""

from detente.records.atomic import plain, write_bytes, write_json, write_text
from detente.records.reading import Metric, Run, Samples, find_runs, no_collections, read_run
from detente.records.schema import (
    SCHEMA,
    VOLATILE,
    ConfigMismatch,
    RecordError,
    Row,
    SchemaError,
    UnwritableFolder,
    differences,
)
from detente.records.software import versions
from detente.records.writing import RunFolder

__all__ = [
    "SCHEMA",
    "VOLATILE",
    "ConfigMismatch",
    "Metric",
    "RecordError",
    "Row",
    "Run",
    "RunFolder",
    "Samples",
    "SchemaError",
    "UnwritableFolder",
    "differences",
    "find_runs",
    "no_collections",
    "plain",
    "read_run",
    "versions",
    "write_bytes",
    "write_json",
    "write_text",
]
