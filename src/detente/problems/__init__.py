"""Analytic toy problems with declared optima: what a method does can be held against what is known.

What belongs here: a class with the losses as a function of a few numbers and the facts that can be derived by hand
(Pareto set, optimum of every weighting). Nothing of ours is imported; running methods on a problem is an experiment.
"""

from detente.problems.base import AnalyticProblem
from detente.problems.toy import Toy

__all__ = ["AnalyticProblem", "Toy"]
