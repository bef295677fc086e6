"""Search over any keys with Optuna, by the figure of a finished run: `hydra/sweeper=optuna`."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.utils import JobStatus
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from fpn_ablate.config.schema import Config
from fpn_ablate.runs import skip
from fpn_ablate.sweep.checks import as_hydra_error
from fpn_ablate.sweep.objective import objective, objective_column
from fpn_ablate.sweep.publish import publish
from fpn_ablate.sweep.sweeper import TableSweeper
from fpn_ablate.utils.console import literal, log_line
from fpn_ablate.utils.errors import UserError, first_line

SHOWN = 10  # trials at the end of a search; all of them are in the ledger


@dataclass
class Trial:
    """One proposal of Optuna's, run with each seed."""

    proposal: Any  # optuna.trial.Trial
    params: dict[str, str]
    jobs: list[list[str]]
    cells: list[Config] = field(default_factory=list)
    value: float | None = None  # the mean over the seeds; None: not finished by all of them, or undefined
    told: bool = False  # to Optuna

    def command(self) -> str:
        """Return the command that runs this trial alone."""
        first, *others = self.jobs
        words = [word.removeprefix("++") for word in first]
        if others:  # with several seeds, the last word of each job
            words = ["-m", *words[:-1], ",".join([words[-1], *(job[-1].removeprefix("seed=") for job in others)])]
        return f"python -m fpn_ablate {shlex.join(words)}"


class OptunaSweeper(TableSweeper):
    """Propose values of all keys that have several, train each proposal with all values of `seed`, and show the best.

    A trial is a recipe or a row of its own, as if its values had been typed. Failed trials cost the search nothing but
    themselves, unless on_failure=stop.
    """

    def __init__(
        self, n_trials: int, n_jobs: int, direction: str, sampler: DictConfig, params: dict[str, str] | None = None
    ) -> None:
        super().__init__(params=params)
        self.n_trials, self.at_once = n_trials, n_jobs
        with as_hydra_error(exit_on_error=True):
            if min(n_trials, n_jobs) < 1:
                raise UserError("hydra.sweeper.n_trials and hydra.sweeper.n_jobs must be 1 at least")
            self.study = _create_study(direction, sampler)
        self.trials: list[Trial] = []

    def setup(self, **arguments: Any) -> None:
        super().setup(**arguments)
        with as_hydra_error(exit_on_error=True):
            if getattr(self.launcher.launcher, "detach", False):
                raise UserError(
                    "hydra/sweeper=optuna proposes by the results of earlier trials: leave out hydra.launcher.detach=true"
                )

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Divide the keys into those that are searched, those that are fixed, and the seeds; return no job yet."""
        self.space, self.fixed, self.seeds = {}, {}, [""]
        with as_hydra_error(exit_on_error=True):
            for override in overrides:
                key = override.get_key_element()
                for values in (self.space, self.fixed):
                    values.pop(key, None)  # the last value of a key that is given twice counts
                if key == "seed":
                    self.seeds = list(override.sweep_string_iterator() if override.is_sweep_override() else [override.value()])
                elif override.is_sweep_override():
                    self.space[key] = _distribution(override)
                else:
                    self.fixed[key] = override.get_value_element_as_str()
            if not self.space:
                raise UserError(
                    "hydra/sweeper=optuna: no key has several values; give one an interval or a list, as "
                    "'recipe.optimizer.lr=tag(log,interval(1e-4,1e-1))'"
                )
        return []

    def is_done(self) -> bool:
        """Return True if all trials have ended; else propose the next ones, and take their finished cells out."""
        while True:
            self._tell()
            if len(self.trials) >= self.n_trials:
                return True
            self._ask()
            if not super().is_done():
                return False

    def _ask(self) -> None:
        batch = []
        for _ in range(min(self.at_once, self.n_trials - len(self.trials))):
            proposal = self.study.ask(self.space)
            # Four digits, since they become part of a recipe's name.
            params = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in proposal.params.items()}
            fixed = [f"{key}={value}" for key, value in (self.fixed | params).items()]
            batch.append(Trial(proposal, params, [[*fixed, f"seed={seed}"] if seed != "" else fixed for seed in self.seeds]))
        self.trials += batch
        self.overrides.append([job for trial in batch for job in trial.jobs])

    def _validated(self, batch: Sequence[Sequence[str]]) -> list[Config]:
        cells = super()._validated(batch)
        with as_hydra_error(exit_on_error=True):
            objective_column(cells[0])
        seeds = len(self.seeds)
        for number, trial in enumerate(self.trials[-(len(batch) // seeds) :]):
            trial.cells = cells[number * seeds : (number + 1) * seeds]
        return cells

    def _tell(self) -> None:
        """Tell Optuna the results of the trials that have ended."""
        from optuna.trial import TrialState

        for trial in self.trials:
            if not trial.told:
                values = [self._value(job, cfg) for job, cfg in zip(trial.jobs, trial.cells, strict=False)]
                trial.value = fmean(values) if values and None not in values else None
                trial.told = True
                self.study.tell(trial.proposal, trial.value, TrialState.FAIL if trial.value is None else TrialState.COMPLETE)

    def _value(self, job: Sequence[str], cfg: Config) -> float | None:
        job_return = self.launcher.returns.get(tuple(job))
        value = job_return._return_value if job_return and job_return.status == JobStatus.COMPLETED else None
        return objective(cfg, skip.finished_record(cfg)) if value is None else value  # if finished before

    def publish(self) -> None:
        """Write the table of the best trial, since each recipe has a table of its own, and print the best trials."""
        self._tell()  # also of trials that finished before a signal stopped the others
        finished = [trial for trial in self.trials if trial.value is not None]
        ordered = sorted(finished, key=lambda trial: trial.value, reverse=self.study.direction.name == "MAXIMIZE")
        if not ordered:
            publish(self.cells)
            return
        best = ordered[0].cells[0]
        names = best.table, best.recipe.name
        publish([cfg for cfg in self.cells if (cfg.table, cfg.recipe.name) == names], printed=False)
        column = objective_column(best, (skip.finished_record(best) or {}).get("metrics"))
        Console(highlight=False).print(_trials_table(ordered, column.title if column else ""))
        failed = len(self.trials) - len(finished)
        log_line(f"{len(finished)} trials of {self.n_trials} finished" + (f", {failed} did not" if failed else ""))
        log_line(f"best trial: {ordered[0].command()}")


def _create_study(direction: str, sampler: DictConfig) -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError('hydra/sweeper=optuna: Optuna is not installed; pip install "fpn-ablate[optuna]"') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(direction=direction, sampler=instantiate(sampler))
    except (ValueError, InstantiationException) as error:
        raise UserError(f"hydra.sweeper: {first_line(error)}") from None


def _distribution(override: Override) -> Any:
    """Return Optuna's distribution of a key's values: `interval(a,b)` (integers if both are), tagged `log`; or a list.

    Raises:
        UserError: Optuna does not take the interval.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not override.is_interval_sweep():
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    interval: Any = override.value()
    whole = isinstance(interval.start, int) and isinstance(interval.end, int)
    try:
        return (IntDistribution if whole else FloatDistribution)(interval.start, interval.end, log="log" in interval.tags)
    except ValueError as error:
        raise UserError(f"{override.input_line}: {error}") from None


def _trials_table(ordered: Sequence[Trial], title: str) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, title=f"The best of {len(ordered)} trials", title_justify="left")
    for name in ("trial", title, *(key.lstrip("+") for key in ordered[0].params)):
        table.add_column(name, justify="right")
    for trial in ordered[:SHOWN]:
        table.add_row(str(trial.proposal.number), f"{trial.value:.2f}", *map(literal, trial.params.values()))
    return table
