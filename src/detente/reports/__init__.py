"""Reports from stored records only: verdict in words, table, figures, one self-contained page.

Nothing here trains, and nothing is shown that is not in a run folder.
"""

from detente.reports.contributions import balance_of, balance_png
from detente.reports.html import NoRuns, build_report
from detente.reports.plane import accuracy_plane_png
from detente.reports.tables import Table, print_table, results_table, rich_table
from detente.reports.verdict import Verdict, verdict

__all__ = [
    "NoRuns",
    "Table",
    "Verdict",
    "accuracy_plane_png",
    "balance_of",
    "balance_png",
    "build_report",
    "print_table",
    "results_table",
    "rich_table",
    "verdict",
]
