"""Store metrics on bootstrap samples of the images: one file in each run's folder, and one beside a ledger for all its runs.

B replicates. The array of a run has B records with one field a metric.
"""

from collections import UserDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from fpn_ablate.utils.files import UNREADABLE, open_arrays, write_atomically
from fpn_ablate.utils.paths import RESAMPLED

_ONE_RUN = "resampled"  # name of the array in a run's file; beside a ledger it is the run's fingerprint
SCALE, UNDEFINED = 50_000, 65_535  # values are 16-bit integers in steps of 0.002 percentage points


def save(path: Path, replicates: Mapping[str, np.ndarray]) -> None:
    """Write a run's file from {metric: (B,) fractions, NaN where undefined}."""
    packed = np.empty(len(next(iter(replicates.values()))), dtype=[(name, "<u2") for name in replicates])
    for name, values in replicates.items():
        packed[name] = np.where(np.isnan(values), UNDEFINED, np.round(np.nan_to_num(values) * SCALE))
    np.savez_compressed(path, **{_ONE_RUN: packed})


class Replicates(UserDict):
    """Replicates of runs, {fingerprint: {metric: (B,) fractions}}, read on access; KeyError if a run's cannot be read.

    It holds {fingerprint: (file, name of the array in it)}.
    """

    @staticmethod
    def of_runs(runs: Iterable[tuple[str, Path]]) -> "Replicates":
        """Take the files of runs, given as (fingerprint, folder)."""
        return Replicates({name: (folder / RESAMPLED, _ONE_RUN) for name, folder in runs if (folder / RESAMPLED).is_file()})

    @staticmethod
    def beside(ledger: Path) -> "Replicates":
        """Take the file beside a ledger."""
        file = ledger.with_name(RESAMPLED)
        try:
            with open_arrays(file) as content:
                return Replicates({name: (file, name) for name in content.files})
        except UNREADABLE:
            return Replicates({})

    def __deepcopy__(self, memo: dict) -> "Replicates":
        return self  # pandas copies a frame's attributes with every selection

    def __getitem__(self, fingerprint: str) -> dict[str, np.ndarray]:
        packed = self._packed(fingerprint)
        undefined = {name: packed[name] == UNDEFINED for name in packed.dtype.names}
        return {name: np.where(undefined[name], np.nan, packed[name] / SCALE) for name in packed.dtype.names}

    def _packed(self, fingerprint: str) -> np.ndarray:
        """Return a run's array of records; KeyError if it cannot be read."""
        file, name = self.data[fingerprint]
        try:
            with open_arrays(file) as content:
                packed = content[name]
            if packed.ndim != 1 or not packed.dtype.names or any(packed.dtype[name] != "<u2" for name in packed.dtype.names):
                raise ValueError("no records of metrics")
        except UNREADABLE:
            raise KeyError(fingerprint) from None
        return packed

    def write(self, path: Path, fingerprints: Iterable[str]) -> None:
        """Write the replicates of these runs to one file, if any run has them; the same runs give the same bytes."""
        arrays = {}
        for name in sorted({name for name in fingerprints if name in self}):
            with suppress(KeyError):
                arrays[name] = self._packed(name)
        if arrays:
            write_atomically(path, lambda temporary: np.savez_compressed(temporary, **arrays))
