"""Statistics over runs: means with their spread, and Δm over seeds. Numbers in, numbers out."""

from detente.statistics.summary import Spread, delta_m_spread, spread

__all__ = ["Spread", "delta_m_spread", "spread"]
