"""One file per published protocol; every file found here is offered by `detente experiments`.

What belongs here: a typed configuration, the problem it builds, and the published numbers of the protocol.
"""

from detente.experiments.own import training_function
from detente.experiments.registry import Experiment, UnknownExperiment, experiments, find

__all__ = ["Experiment", "UnknownExperiment", "experiments", "find", "training_function"]
