"""What is claimed of a table's rows, and what its runs say to it. The claims are data: experiments/claims.yaml."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fpn_ablate.report.collate.cells import Contrast
from fpn_ablate.report.collate.compare import Comparison
from fpn_ablate.report.collate.definition import is_number, mapping, read_yaml, text_of
from fpn_ablate.report.collate.stats import LEVEL, holm, seeds_needed
from fpn_ablate.report.collate.table import Claim, Verdict
from fpn_ablate.utils.errors import UserError, short_repr
from fpn_ablate.utils.paths import CLAIMS

LEAST = 5  # times its bound, in points, a row must have of a metric: rows that learned nothing are all about the same
ICONS = {"supported": "✓", "contradicted": "✗", "inconclusive": "?", "not run": "–"}
VERDICTS = ("supported", "contradicted", "inconclusive", "not run")


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
            raise UserError(f"{where}: {key} must be a list of names, found {short_repr(entry[key])}")
    bounds = {key: entry[key] for key in ("above", "below") if key in entry}
    if not bounds or not all(is_number(value) for value in bounds.values()):
        raise UserError(f"{where}: needs 'above' or 'below', or both, as numbers")
    if bounds.get("above", -math.inf) >= bounds.get("below", math.inf):
        raise UserError(f"{where}: above must be less than below, found {bounds['above']} and {bounds['below']}")
    less = text_of(where, entry, "less") if "less" in entry else None
    table, words, ours = text_of(where, entry, "table"), text_of(where, entry, "claim"), entry.get("ours", False)
    if type(ours) is not bool:
        raise UserError(f"{where}: ours must be true or false, found {short_repr(ours)}")
    rows = tuple(entry["plus"]), tuple(entry["minus"])
    return [Claim(table, words, metric, *rows, **bounds, less=less, ours=ours) for metric in entry["metrics"]]


def judge(claims: Sequence[Claim], comparison: Comparison) -> tuple[Verdict, ...]:
    """A verdict on each claim of this table."""
    own = [claim for claim in claims if claim.table == comparison.definition.table]
    open_: dict[int, tuple[Contrast, tuple[float, float]]] = {}  # what is left to be judged by its interval
    verdicts: dict[int, Verdict] = {}
    for k, claim in enumerate(own):
        lack = comparison.missing((*claim.plus, *claim.minus), [name for name in (claim.metric, claim.less) if name])
        found = None if lack else comparison.contrast(claim.metric, claim.plus, claim.minus, less=claim.less)
        if found is None or not found.ours.n:
            verdicts[k] = Verdict(claim, "not run", why=f"the table has no {lack}" if lack else None)
        elif why := _obstacle(claim, found, comparison):
            verdicts[k] = Verdict(claim, "inconclusive", found, 1.0, why=why)
        else:
            open_[k] = found, _p_values(claim, found)
    plain = {k: min(1.0, 2 * min(sides)) for k, (_, sides) in open_.items()}
    adjusted = dict(zip(plain, holm(list(plain.values())), strict=True))
    for k, (found, (inside, outside)) in open_.items():
        if adjusted[k] < 1 - LEVEL:
            verdicts[k] = Verdict(own[k], "supported" if inside < outside else "contradicted", found, adjusted[k])
        else:
            needed = _needed(own[k], found, len(open_) if adjusted[k] == 1.0 else adjusted[k] / plain[k])
            verdicts[k] = Verdict(own[k], "inconclusive", found, adjusted[k], needed)
    return tuple(verdicts[k] for k in range(len(own)))


def _obstacle(claim: Claim, found: Contrast, comparison: Comparison) -> str | None:
    """Why a difference may not be judged, whatever its interval."""
    if found.ours.n < 2:
        return "one seed says nothing of seeds"
    if found.blind:
        return "resampled.npz of a run is missing (python -m fpn_ablate artifacts RUNS makes it)"
    means = [comparison.rows[name].cells[claim.metric].ours.mean for name in (*claim.plus, *claim.minus)]
    if min(means) < LEAST * max(map(abs, claim.bounds)):
        return f"a row has less than {LEAST * max(map(abs, claim.bounds)):g} %, so next to nothing is compared"
    return None


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
