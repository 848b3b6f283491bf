"""Reports from stored records only: verdict in words, table, figures, one self-contained page.

Nothing here trains, and nothing is shown that is not in a run folder.
"""

from detente.reports.contributions import balance_of, balance_png
from detente.reports.exports import export_report
from detente.reports.html import NoRuns, build_report, read_studies, write_report
from detente.reports.paper import Undrawable
from detente.reports.tables import Table, print_table, results_table, rich_table
from detente.reports.verdict import Verdict, verdict

__all__ = [
    "NoRuns",
    "Table",
    "Undrawable",
    "Verdict",
    "balance_of",
    "balance_png",
    "build_report",
    "export_report",
    "print_table",
    "read_studies",
    "results_table",
    "rich_table",
    "verdict",
    "write_report",
]
