"""Many runs under equal conditions: who takes part, which runs are needed, where they run, what came out.

What belongs here: the sweep's own options (`asked`), the contenders and their search spaces (`contenders`), the pure
plan from results to the next runs (`plan`), workers (`workers`), the table that lives while they work (`watch`), what
the finished runs say (`outcome`), and the sweep itself (`sweep`).
"""

from detente.sweeps.asked import SweepConfig
from detente.sweeps.sweep import plan_of, sweep

__all__ = ["SweepConfig", "plan_of", "sweep"]
