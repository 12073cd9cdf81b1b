"""Experiments: arms trained at an equal budget and measured on the same held-out phantoms."""

from med3dvlm.experiment.follow import follow
from med3dvlm.experiment.outcome import Outcome, outcome
from med3dvlm.experiment.spec import Experiment, ExperimentError, load_experiment

__all__ = ["Experiment", "ExperimentError", "Outcome", "follow", "load_experiment", "outcome"]
