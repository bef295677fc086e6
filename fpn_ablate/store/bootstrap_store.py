"""Metrics on images drawn anew, as files: of one run (`resampled.npz` in its folder), and of many beside a ledger.

B replicates. A run's is one array of B records with a field for each metric.
"""

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from fpn_ablate.utils.files import UNREADABLE, write_atomically

FILE = "resampled.npz"
_OWN = "resampled"  # the name of the array in a run's file; in one of many runs it is the run's fingerprint
SCALE, UNDEFINED = 50_000, 65_535  # 16-bit integers in steps of 0.002 of a percentage point


def save(path: Path, resampled: Mapping[str, np.ndarray]) -> None:
    """{metric: (B,) fractions, NaN where undefined}."""
    packed = np.empty(len(next(iter(resampled.values()))), dtype=[(name, "<u2") for name in resampled])
    for name, values in resampled.items():
        packed[name] = np.where(np.isnan(values), UNDEFINED, np.round(np.nan_to_num(values) * SCALE))
    np.savez_compressed(path, **{_OWN: packed})


class Replicates(Mapping[str, dict[str, np.ndarray]]):
    """{fingerprint: {metric: (B,) fractions}} of runs, read when asked for. A run without a readable file is not in it."""

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        self._places, self._read = dict(places), {}

    @staticmethod
    def of_runs(runs: Iterable[tuple[str, Path]]) -> "Replicates":
        """Of runs by fingerprint and folder."""
        return Replicates({name: (folder / FILE, _OWN) for name, folder in runs if (folder / FILE).is_file()})

    @staticmethod
    def beside(ledger: Path) -> "Replicates":
        """Those of the runs of a ledger."""
        file = ledger.with_name(FILE)
        try:
            with np.load(file, allow_pickle=False) as content:
                return Replicates({name: (file, name) for name in content.files})
        except UNREADABLE:
            return Replicates({})

    def __or__(self, other: "Replicates") -> "Replicates":
        return Replicates(self._places | other._places)

    def __deepcopy__(self, memo: dict) -> "Replicates":
        return self  # pandas copies what a frame carries with every selection

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, fingerprint: str) -> dict[str, np.ndarray]:
        packed = self._packed(fingerprint)
        undefined = {name: packed[name] == UNDEFINED for name in packed.dtype.names}
        return {name: np.where(undefined[name], np.nan, packed[name] / SCALE) for name in packed.dtype.names}

    def _packed(self, fingerprint: str) -> np.ndarray:
        """Raises KeyError where the run has none that can be read."""
        if fingerprint not in self._read:
            file, name = self._places[fingerprint]
            try:
                with np.load(file, allow_pickle=False) as content:
                    wanted = [name] if name == _OWN else [n for n, place in self._places.items() if place == (file, n)]
                    read = {n: content[n] for n in wanted}  # a file of many is opened once
                if any(packed.dtype.names is None or packed.ndim != 1 for packed in read.values()):
                    raise ValueError("no records of metrics")
            except UNREADABLE:
                raise KeyError(fingerprint) from None
            self._read |= {fingerprint if name == _OWN else n: packed for n, packed in read.items()}
        return self._read[fingerprint]

    def write(self, path: Path, fingerprints: Iterable[str]) -> None:
        """Those of these runs in one file; the same runs give the same bytes. Nothing where no run has any."""
        found = {}
        for name in sorted({name for name in fingerprints if name in self._places}):
            try:
                found[name] = self._packed(name)
            except KeyError:
                continue
        if found:
            write_atomically(path, partial(_write, arrays=found))


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """As np.savez_compressed, but without the time of writing."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
