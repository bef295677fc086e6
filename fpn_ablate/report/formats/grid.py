"""Turn a table into a grid of plain text, which `tables` prints in each format."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from fpn_ablate.report.collate.cells import Cell, Contrast
from fpn_ablate.report.collate.claims import NO_RESULT
from fpn_ablate.report.collate.definition import Fact, Metric
from fpn_ablate.report.collate.table import Claim, EffectRow, Row, Table, Verdict, clean

CHECK = "✓"
WITHIN_NOISE = "†"


@dataclass(frozen=True)
class Line:
    """The cells of one printed line, as plain text; `differences` are those of ours to the paper's values, of effects p-values.

    `kind`: "paper" is the paper's line below one of ours, "published" a row of the paper without a line of ours, "control"
    the A/A control.
    """

    kind: Literal["ours", "paper", "published", "control", "effect"]
    label: str
    facts: tuple[str, ...]
    metrics: tuple[str, ...]
    differences: tuple[str, ...] = ()
    best: tuple[bool, ...] = ()  # metrics that are better than in all other rows (`Comparison.best`)
    row: Row | None = None  # of kind "ours"

    @property
    def ours(self) -> bool:
        return self.kind in ("ours", "control", "effect")

    @property
    def state(self) -> str | None:
        """Return the text in place of all metrics, as `not run`; None if there is a figure."""
        text = self.metrics[0] if self.ours and len(set(self.metrics)) == 1 else "0"
        return None if re.match(r"[+-]?\d", text) else text

    @property
    def cells(self) -> tuple[str, ...]:
        """Return label, facts and metrics, with the differences in brackets."""
        pairs = zip(self.metrics, self.differences or [""] * len(self.metrics), strict=True)
        return (self.label, *self.facts, *(f"{value} ({diff})" if diff else value for value, diff in pairs))


@dataclass(frozen=True)
class Grid:
    """The whole content of a printed table, as clean plain text; labels refer to `notes` as [1], [2], ..."""

    title: str
    banner: str
    legend: str
    header: tuple[str, ...]
    align_right: tuple[bool, ...]  # by column
    paper_label: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    verdicts: tuple[dict[str, str], ...]  # by VERDICT_HEADER
    footer: tuple[tuple[str, str], ...]


VERDICT_HEADER = ("claim", "metric", "ours", "n", "published", "verdict", "p (Holm)")


def grid(table: Table) -> Grid:
    """Return the printed content of a table, the same for every format."""
    definition = table.definition
    lines: list[Line] = []
    notes: list[str] = []
    for row in table.rows:
        mark = ""
        if note := _note(row):
            notes.append(note)
            mark = f" [{len(notes)}]"
        if row.published_only:
            lines.append(_paper_line(table, row))
            continue
        lines.append(_our_line(table, row, mark))
        if row.published:
            lines.append(_paper_line(table, row))
        if table.control and table.control.row == row.row:
            lines.append(_our_line(table, table.control, "", "control"))
    lines += [_effect_line(table, effect) for effect in table.effects]
    titles = [column.title for column in (*definition.facts, *definition.metrics)]
    titles.insert(len(definition.facts), "n")
    return Grid(
        title=clean(f"{definition.title} · data {table.data} · recipe {table.recipe}"),
        banner=table.warning,
        legend=clean(_legend(table)),
        header=("", *map(clean, titles)),
        align_right=(*(False for _ in definition.facts), False, True, *(True for _ in definition.metrics)),
        paper_label=_paper_label(table),
        lines=tuple(lines),
        notes=tuple(notes),
        verdicts=tuple(_verdict(table, verdict) for verdict in table.verdicts),
        footer=tuple((label, clean(text)) for label, text in table.footer),
    )


def _our_line(table: Table, row: Row, mark: str, kind: Literal["ours", "control"] = "ours") -> Line:
    definition = table.definition
    facts = tuple(_fact_text(fact, row.facts[fact.key]) for fact in definition.facts)
    cells = [(metric, row.cells[metric.key]) for metric in definition.metrics]
    metrics = tuple(_estimate_text(*cell, len(row.shown)) if row.shown else row.state for cell in cells)
    best = tuple(kind == "ours" and (row.row, metric.key) in table.best for metric in definition.metrics)
    label = row.label if kind == "control" else _label(table, row)
    label += f", {row.state}" if row.shown and not row.seeds else ""
    shown = row if kind == "ours" else None
    return Line(kind, clean(label) + mark, (*facts, str(len(row.shown))), metrics, (), best, shown)


def _verdict(table: Table, verdict: Verdict) -> dict[str, str]:
    claim, contrast = verdict.claim, verdict.contrast
    titles = {metric.key: metric.title for metric in table.definition.metrics}
    metric = " beyond ".join(titles.get(name, name) for name in (claim.metric, claim.less) if name)
    outcome = verdict.verdict + (f"; {verdict.reason}" if verdict.reason else "")
    ours = published = p = ""
    if contrast is not None:
        if verdict.verdict == "inconclusive" and not verdict.reason:
            needed, planned = verdict.seeds_needed, "" if table.definition.seeds else ", planned from the start,"
            outcome += f"; {needed} seeds{planned} would tell" if needed else "; more seeds alone would not tell"
        look = verdict.look
        if look and table.definition.seeds and (look.number > 1 or look.seeds < verdict.available):
            outcome += f"; look {look.number} of {look.seeds} seeds"
        if contrast.within_noise:
            outcome += f"; within the noise of equal rows, {contrast.noise:.1f}"
        ours = _contrast_text(contrast)
        published = "" if verdict.published is None else _contrast_text(contrast, verdict.published)
        p = "" if verdict.reason else p_text(verdict.p)
    text = f"{claim.text} ({_bounds(claim)})" + (", ours only" if claim.ours else "")
    cells = text, metric, ours, str(contrast.ours.n if contrast else 0), published, outcome, p
    return dict(zip(VERDICT_HEADER, map(clean, cells), strict=True))


def _contrast_text(contrast: Contrast, published: float | None = None) -> str:
    """Write a difference with its interval, or a ratio as x 2.31 (2.25 to 2.38); or the `published` one in its place."""
    low, high, half_width = (contrast.shown(contrast.ours.low), contrast.shown(contrast.ours.high), contrast.ours.half_width)
    mean = contrast.shown(contrast.ours.mean if published is None else published)
    text = f"x {mean:.2f}" if contrast.ratio else f"{mean:+z.1f}"
    if published is not None or not varies(half_width) or mean is None:
        return text
    return text + (f" ({low:.2f} to {high:.2f})" if contrast.ratio else f" ± {half_width:.1f}")


def varies(half_width: float | None) -> bool:
    """Return whether a figure has an interval to show.

    One that is the same in every draw, as 0.0 where nothing was found or a ratio of GFLOPs, has none: "± 0.0" would read as
    certain.
    """
    return half_width is not None and half_width > 1e-9  # less is rounding


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _bounds(claim: Claim) -> str:
    """Write a claim's bounds in points, as `> 0`, `< 2` or `-2 to 2`; of a ratio as `> x 2`."""
    above, below = (f"{'x ' * claim.ratio}{bound:g}" for bound in (claim.above, claim.below))
    if len(claim.bounds) == 2:
        return f"{above} to {below}"
    return f"> {above}" if math.isfinite(claim.above) else f"< {below}"


def _label(table: Table, row: Row) -> str:
    return f"{row.name}, ours only" if table.published and not row.published else row.name


def _paper_line(table: Table, row: Row) -> Line:
    definition, facts = table.definition, []
    for fact in definition.facts:
        text = _fact_text(fact, row.published.get(fact.key))
        is_above = not row.published_only and text == _fact_text(fact, row.facts[fact.key])
        facts.append("" if is_above else text)
    cells = [(metric, row.cells[metric.key]) for metric in definition.metrics]
    label = f"{_paper_label(table)} ({table.difference_label})"
    return Line(
        kind="published" if row.published_only else "paper",
        label=clean(f"{_label(table, row)}, {_paper_label(table)}, published only") if row.published_only else label,
        facts=(*facts, ""),
        metrics=tuple("–" if c.published is None else f"{c.published:.{m.digits}f}" for m, c in cells),
        differences=tuple("" if c.difference is None else f"{c.difference:+.{m.digits}f}" for m, c in cells),
    )


def _effect_line(table: Table, effect: EffectRow) -> Line:
    def value(metric: Metric) -> str:
        if metric.source:
            return "–"
        if not effect.seeds:
            return NO_RESULT
        cell = effect.cells[metric.key]
        return _estimate_text(metric, cell, len(effect.seeds), "+") + f" {WITHIN_NOISE}" * cell.within_noise

    values = tuple(map(value, table.definition.metrics))
    p_values = [effect.p.get(metric.key) for metric in table.definition.metrics]
    differences = tuple("" if p is None else f"p {p_text(p)}" for p in p_values)
    facts = (*("" for _ in table.definition.facts), str(len(effect.seeds)))
    label = clean(effect.title if effect.row else f"effect, ours: {effect.title}")
    return Line("effect", label, facts, values, differences)


def _paper_label(table: Table) -> str:
    paper = table.definition.paper
    if paper is None:
        return "paper"
    return clean(paper.name if table.same_data else f"{paper.name}: {paper.data}")


def _legend(table: Table) -> str:
    """Explain the second line of a row, and whether its difference is meaningful."""
    if not table.published:
        return ""
    paper = table.definition.paper
    # "published": figures of several sources.
    source = {"paper": "the paper's", "published": "published"}.get(paper.name, f"{paper.name}'s")
    text = f"Under each row: {source} figures on {paper.data}, and Δ = ours − {paper.name}".removesuffix(".")
    if table.same_data:
        return f"{text}."
    return f"{text}. Δ is BETWEEN DIFFERENT DATA SETS ({table.data} and {paper.data}): for orientation only."


def _note(row: Row) -> str:
    """Say how the seeds that did not finish ended."""
    causes: dict[str, list[int]] = {}
    for seed, state in row.states.items():
        if state not in ("finished", "running"):
            error = clean(row.errors.get(seed, ""))
            error = error if len(error) <= 200 else f"{error[:199]}…"
            causes.setdefault(f"{state} ({error})" if error else state, []).append(seed)
    parts = [f"seed {', '.join(map(str, seeds))}: {cause}" for cause, seeds in causes.items()]
    remaining = f"; the cells are over {len(row.seeds)} of {len(row.states)} seeds" if parts and row.seeds else ""
    remaining = remaining or ("; its figures enter no comparison" if row.shown and not row.seeds else "")
    return clean(f"{row.row}, {'; '.join(parts)}{remaining}") if parts else ""


def _estimate_text(metric: Metric, cell: Cell, seeds: int, sign: str = "") -> str:
    ours = cell.ours
    if ours.mean is None:
        return "n/a"
    text = f"{ours.mean:{sign}z.{metric.digits}f}"
    # A cost has no interval: it varies with the machine's other load, not with images.
    text += f" ± {ours.half_width:.{metric.digits}f}" if varies(ours.half_width) and metric.source is None else ""
    # If the metric is undefined for some seeds, column n is wrong for this cell.
    return text + (f" (n={ours.n})" if ours.n < seeds else "")


def _fact_text(fact: Fact, value: Any) -> str:
    if value is None or value is False:
        return ""
    if fact.style == "check" and value is True:
        return CHECK
    if fact.style == "count" and type(value) in (int, float) and value >= 1000:  # as the paper does: 47250 is 47k
        return f"{value / 1e6:.1f}M" if value >= 999_500 else f"{value / 1000:.0f}k"
    return clean(value)
