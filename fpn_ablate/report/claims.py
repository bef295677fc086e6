"""What is claimed of a table's rows, and what its runs say to it. The claims are data: experiments/claims.yaml."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpn_ablate.errors import UserError
from fpn_ablate.paths import CLAIMS
from fpn_ablate.report.cells import Cell, Contrast, beyond, contrast
from fpn_ablate.report.definition import Definition, is_number, mapping, read_yaml, text_of
from fpn_ablate.report.stats import LEVEL, holm, seeds_needed

VERDICTS = ("supported", "contradicted", "inconclusive", "not run")


@dataclass(frozen=True)
class Claim:
    """That a difference of rows lies above and/or below a bound, in points. `less`: a metric whose difference is taken away.
    Rows by the first of their names; `ours` where nobody has published it."""

    table: str
    text: str
    metric: str
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    above: float = -math.inf
    below: float = math.inf
    less: str | None = None
    ours: bool = False

    @property
    def bounds(self) -> tuple[float, ...]:
        return tuple(bound for bound in (self.above, self.below) if math.isfinite(bound))


@dataclass(frozen=True)
class Verdict:
    """What the runs say to a claim.

    Attributes:
        found: the difference; None where no seed has all rows.
        p: the p-value of the verdict, after Holm's correction over the claims of the table; None where nothing was compared.
        needed: seeds that would tell, where it is inconclusive; None: not even 1000, or not known.
        noise: the difference that equal rows may show by chance (A/A control), in points; None without a control.
        missing: the row or metric that the table does not have.
    """

    claim: Claim
    verdict: str
    found: Contrast | None = None
    p: float | None = None
    needed: int | None = None
    noise: float | None = None
    missing: str | None = None

    @property
    def within_noise(self) -> bool:
        return self.noise is not None and self.found is not None and abs(self.found.ours.mean or 0.0) < self.noise


def load(folders: Iterable[Path]) -> list[Claim]:
    """All claims of the `claims.yaml` of these folders. Raises UserError where one is not valid."""
    found: list[Claim] = []
    for file in (folder / CLAIMS for folder in folders):
        if not file.is_file():
            continue
        content = read_yaml(file)
        entries = content.get("claims") if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{file}: must hold a list 'claims'")
        for number, entry in enumerate(entries):
            found += _parse(f"{file}: claims[{number}]", entry)
    return found


def _parse(where: str, entry: Any) -> list[Claim]:
    entry = mapping(where, entry, {"table", "claim", "metrics", "plus", "minus"}, {"above", "below", "less", "ours"})
    for key in ("metrics", "plus", "minus"):
        if not isinstance(entry[key], list) or not entry[key] or not all(isinstance(name, str) for name in entry[key]):
            raise UserError(f"{where}: {key} must be a list of names, found {entry[key]!r}")
    bounds = {key: entry[key] for key in ("above", "below") if key in entry}
    if not bounds or not all(is_number(value) for value in bounds.values()):
        raise UserError(f"{where}: needs 'above' or 'below', or both, as numbers")
    if bounds.get("above", -math.inf) >= bounds.get("below", math.inf):
        raise UserError(f"{where}: above must be less than below, found {bounds['above']} and {bounds['below']}")
    less = text_of(where, entry, "less") if "less" in entry else None
    table, words, ours = text_of(where, entry, "table"), text_of(where, entry, "claim"), entry.get("ours", False)
    if type(ours) is not bool:
        raise UserError(f"{where}: ours must be true or false, found {ours!r}")
    rows = tuple(entry["plus"]), tuple(entry["minus"])
    return [Claim(table, words, metric, *rows, **bounds, less=less, ours=ours) for metric in entry["metrics"]]


def judge(
    claims: Sequence[Claim],
    definition: Definition,
    rows: Mapping[str, Mapping[str, Cell]],
    seeds: Mapping[str, Collection[int]],
    noise: Mapping[str, float | None],
) -> tuple[Verdict, ...]:
    """A verdict on each claim of this table.

    Args:
        rows: {first name: {metric: cell}} of the promised rows. seeds: {first name: finished seeds}.
        noise: {metric: what equal rows differ by}.
    """
    own = [claim for claim in claims if claim.table == definition.table]
    missing = [_missing(claim, rows) for claim in own]
    found = [None if lack else _compared(claim, rows, seeds) for claim, lack in zip(own, missing, strict=True)]
    compared = [k for k, difference in enumerate(found) if difference is not None]
    sides = {k: _p_values(own[k], found[k]) for k in compared}
    plain = {k: min(1.0, 2 * min(sides[k])) for k in compared}
    adjusted = dict(zip(compared, holm(list(plain.values())), strict=True))
    verdicts = []
    for k, claim in enumerate(own):
        if found[k] is None:
            verdicts.append(Verdict(claim, "not run", missing=missing[k]))
            continue
        word = "inconclusive"
        if adjusted[k] < 1 - LEVEL:
            word = "supported" if sides[k][0] < sides[k][1] else "contradicted"
        needed = None
        if word == "inconclusive":
            needed = _needed(claim, found[k], len(compared) if adjusted[k] == 1.0 else adjusted[k] / plain[k])
        verdicts.append(Verdict(claim, word, found[k], adjusted[k], needed, noise.get(claim.metric)))
    return tuple(verdicts)


def _missing(claim: Claim, rows: Mapping[str, Mapping[str, Cell]]) -> str | None:
    """A table of the user's own, under the name of ours, need not have what ours has."""
    for name in (*claim.plus, *claim.minus):
        if name not in rows:
            return f"row '{name}'"
    metrics = next(iter(rows.values()))
    return next((f"metric '{metric}'" for metric in filter(None, (claim.metric, claim.less)) if metric not in metrics), None)


def _compared(claim: Claim, rows: Mapping[str, Mapping[str, Cell]], seeds: Mapping[str, Collection[int]]) -> Contrast | None:
    common = sorted(set.intersection(*(set(seeds[name]) for name in (*claim.plus, *claim.minus))))

    def difference(metric: str) -> Contrast:
        plus, minus = ([rows[name][metric] for name in side] for side in (claim.plus, claim.minus))
        return contrast(plus, minus, common)

    found = difference(claim.metric)
    if claim.less:
        found = beyond(found, difference(claim.less))
    return found if found.ours.n else None


def _p_values(claim: Claim, found: Contrast) -> tuple[float, float]:
    """One-sided, against the claim being wrong, and against its being right."""
    inside = max(
        found.ours.above(claim.above) if math.isfinite(claim.above) else 0.0,
        found.ours.below(claim.below) if math.isfinite(claim.below) else 0.0,
    )
    outside = min(
        found.ours.below(claim.above) if math.isfinite(claim.above) else 1.0,
        found.ours.above(claim.below) if math.isfinite(claim.below) else 1.0,
    )
    return inside, outside


def _needed(claim: Claim, found: Contrast, family: float) -> int | None:
    """Seeds that would tell, by the bound that is nearest, and with the correction for the other claims."""
    return seeds_needed(found.ours, min(claim.bounds, key=lambda bound: abs(found.ours.mean - bound)), family)
