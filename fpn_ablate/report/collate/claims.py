"""Judge the claims about a table's rows. The claims are data: experiments/claims.yaml."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from fpn_ablate.report.collate.cells import Contrast
from fpn_ablate.report.collate.compare import Comparison
from fpn_ablate.report.collate.definition import parse, read_yaml
from fpn_ablate.report.collate.stats import LEVEL, holm, seeds_needed
from fpn_ablate.report.collate.table import Claim, Verdict
from fpn_ablate.utils.errors import UserError, short_repr
from fpn_ablate.utils.paths import CLAIMS

# A row's mean must be this many times the claim's bound (both in points): rows that learned nothing are all about equal.
MIN_MEAN_TO_BOUND = 5
ONE_SEED = "one seed says nothing of seeds"
NO_RESULT = "no result"
ICONS = {"supported": "✓", "contradicted": "✗", "inconclusive": "?", "not judged yet": "–", NO_RESULT: "–"}


def load_claims(folders: Iterable[Path]) -> list[Claim]:
    """Read all claims of the `claims.yaml` of these folders.

    Raises:
        UserError: a file or a claim is not valid.
    """
    claims: list[Claim] = []
    for file in (folder / CLAIMS for folder in folders):
        if not file.is_file():
            continue
        content = read_yaml(file)
        entries = content.get("claims") if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{file}: must hold a list 'claims'")
        for number, entry in enumerate(entries):
            where = f"{file}: claims[{number}]"
            metrics = entry.get("metrics") if isinstance(entry, dict) else None
            if not isinstance(metrics, list) or not metrics:
                raise UserError(f"{where}: metrics must be a list of names, found {short_repr(metrics)}")
            shared = {key: value for key, value in entry.items() if key != "metrics"}
            claims += [parse(Claim, where, shared | {"metric": metric}) for metric in metrics]
    return claims


def judge(claims: Sequence[Claim], comparison: Comparison) -> tuple[Verdict, ...]:
    """Return a verdict on each claim of this table."""
    claims = [claim for claim in claims if claim.table == comparison.definition.table]
    planned = len(comparison.definition.seeds)
    to_test: dict[int, tuple[Verdict, tuple[float, float]]] = {}
    verdicts: dict[int, Verdict] = {}
    for k, claim in enumerate(claims):
        missing = comparison.missing((*claim.plus, *claim.minus), [name for name in (claim.metric, claim.less) if name])
        if missing:
            verdicts[k] = Verdict(claim, NO_RESULT, reason=f"the table has no {missing}")
            continue
        contrast, look = comparison.at_look(claim.metric, claim.plus, claim.minus, claim.less, claim.ratio)
        available = len(comparison.seeds([*claim.plus, *claim.minus]))
        outcome = "not judged yet" if look is None else "inconclusive"
        verdict = Verdict(claim, outcome, contrast, 1.0, look=look, available=available)
        if not contrast.ours.n:
            verdicts[k] = Verdict(claim, NO_RESULT)
        elif look is None:  # counts in the family, or the claims that are complete first would be corrected for fewer
            n = contrast.ours.n
            reason = f"{n} seed{'s' * (n > 1)}, {planned} planned" if planned > 1 else ONE_SEED
            to_test[k] = replace(verdict, reason=reason), (1.0, 1.0)
        elif reason := _reason_not_to_judge(claim, contrast, comparison):
            verdicts[k] = replace(verdict, reason=reason)
        else:
            ours = contrast.ours  # a bound that a claim does not have is infinite, and decides nothing
            above, below = claim.interval
            p_true = max(ours.p_above(above), ours.p_below(below))
            p_false = min(ours.p_below(above), ours.p_above(below))
            to_test[k] = verdict, (p_true, p_false)
    two_sided = {k: min(1.0, 2 * min(sides) * (v.look.factor if v.look else 1.0)) for k, (v, sides) in to_test.items()}
    adjusted = dict(zip(two_sided, holm(list(two_sided.values())), strict=True))
    for k, (verdict, (p_true, p_false)) in to_test.items():
        verdicts[k] = replace(verdict, p=adjusted[k])
        if adjusted[k] < 1 - LEVEL:
            verdicts[k] = replace(verdicts[k], verdict="supported" if p_true < p_false else "contradicted")
        elif not verdict.reason:
            ours = verdict.contrast.ours
            nearest = min(filter(math.isfinite, claims[k].interval), key=lambda bound: abs(ours.mean - bound))
            family = len(to_test) if adjusted[k] == 1.0 else adjusted[k] / two_sided[k]
            verdicts[k] = replace(verdicts[k], seeds_needed=seeds_needed(ours, nearest, family, planned))
    return tuple(verdicts[k] for k in range(len(claims)))


def _reason_not_to_judge(claim: Claim, contrast: Contrast, comparison: Comparison) -> str | None:
    """Return why a difference may not be judged, whatever its interval; None if it may."""
    if contrast.ours.n < 2:
        return ONE_SEED
    if contrast.lacks_replicates:
        return "resampled.npz of a run is missing (python -m fpn_ablate artifacts RUNS makes it)"
    if claim.ratio:
        return None
    means = [comparison.rows[name].cells[claim.metric].ours.mean for name in (*claim.plus, *claim.minus)]
    least = MIN_MEAN_TO_BOUND * max(map(abs, claim.bounds))
    if min(means) < least:
        return f"a row has less than {least:g} %, so next to nothing is compared"
    return None
