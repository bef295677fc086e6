"""A sampler of Optuna's that remembers what it is told."""

import optuna
from optuna.trial import TrialState

TOLD: list[float | None] = []  # the values of ended trials; None: failed


class RecordingSampler(optuna.samplers.RandomSampler):
    def after_trial(self, study, trial, state, values) -> None:
        TOLD.append(values[0] if state == TrialState.COMPLETE else None)
