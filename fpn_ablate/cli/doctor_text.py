"""Print the report of `doctor` as tables."""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fpn_ablate.data.checks.examine import summary
from fpn_ablate.data.checks.findings import NOTE, Finding
from fpn_ablate.evaluation.coco import AREAS
from fpn_ablate.utils.console import literal

CATEGORIES = 20  # shown; all of them are in the JSON
PROBLEMS, MENDED, NOTES = "Problems", "Mended as data.invalid says", "Notes"
WIDTH = 120  # of what is no terminal


def show(report: Mapping[str, Any], limit: int = 50) -> None:
    """Print the report; `limit`: findings to print of each split, 0 for all."""
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())  # a file gets whole lines
    if not console.is_terminal:
        console.width = max(WIDTH, console.width)
    for name, split in report["splits"].items():
        _print_findings(console, name, split, limit, (MENDED, NOTES))
    readable = {name: split for name, split in report["splits"].items() if split["images"] is not None}
    tables = [_overview(report, readable), _sizes(report, readable), _balance(readable)] if readable else []
    tables += [_anchors(report)] if report["anchors"] else []
    for table in tables:
        console.print(table, Text())
    for warning in report["warnings"]:
        where = f"{warning['split']}: " if warning["split"] else ""
        console.print(f"[yellow]Warning[/]: {literal(where + warning['text'])}.")
    for name, split in report["splits"].items():  # above the verdict, whose reasons they are
        _print_findings(console, name, split, limit, (PROBLEMS,))
    for reason in report["refused"]:
        console.print(f"[red]Refused[/]: {literal(reason)}")
    console.print("[green]Sound.[/]" if report["sound"] else "[red]A training would be refused.[/]")


def _print_findings(console: Console, name: str, split: Mapping[str, Any], limit: int, titles: Iterable[str]) -> None:
    groups: dict[str, list[Finding]] = {PROBLEMS: [], MENDED: [], NOTES: []}
    for entry in split["findings"]:
        title = PROBLEMS if entry["refused"] else NOTES if entry["level"] == NOTE else MENDED
        groups[title].append(Finding(**{key: entry[key] for key in Finding.__dataclass_fields__}))
    for title in titles:
        if findings := groups[title]:
            where = f"{name}, {split['annotations']}" if split["annotations"] else name
            text = summary(findings, limit or len(findings))
            text = re.sub(r"\. Fix: .*", "", text) if title == MENDED else text  # data.invalid has applied the fix
            console.print(literal(f"{where}: {title}: {text}"))


def _table(title: str, *columns: str, text: int = 1) -> Table:
    layout = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False}
    table = Table(title=title, title_justify="left", title_style="bold", **layout)
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n < text else "right")
    return table


def _overview(report: Mapping[str, Any], splits: Mapping[str, Any]) -> Table:
    generated = " (generated)" if report["generated"] else ""
    table = _table(f"{literal(report['data'])}{generated}", "", *splits)
    lines = {
        "images": lambda s: f"{s['images']:,}",
        "  used (data.keep_empty)": lambda s: f"{s['images_used']:,}",
        "  without objects": lambda s: f"{s['images_without_objects']:,}",
        "objects": lambda s: f"{s['objects']:,}",
        "crowd regions (not in objects)": lambda s: f"{s['crowd']:,} ({s['crowd_share']:.1%})",
        "objects an image: mean": lambda s: f"{s['objects_an_image']['mean']:.1f}",
        "  median": lambda s: f"{s['objects_an_image']['median']:g}",
        "  most": lambda s: f"{s['objects_an_image']['max']:,}",
        "objects changed": lambda s: ", ".join(f"{n} {repair}" for repair, n in s["repairs"].items()) or "0",
    }
    for label, value in lines.items():
        table.add_row(label, *(value(split) for split in splits.values()))
    return table


def _sizes(report: Mapping[str, Any], splits: Mapping[str, Any]) -> Table:
    recipe, quantiles = report["recipe"], {"q05": "5 %", "median": "median", "q95": "95 %", "max": "max"}
    title = f"Sizes in pixels (√area); input: short side {recipe['short_side']}, long side at most {recipe['max_side']}"
    for where in ("native", "input"):
        low, high = (f"{bound**0.5:.3g}" for bound in next(iter(splits.values()))["sizes"][where]["bounds"])
        title += f"\nin {where} size small is below {low}, large above {high}"
    table = _table(title, "", "", *AREAS[1:], *quantiles.values(), text=2)
    for name, split in splits.items():
        for where in ("native", "input"):
            sizes = split["sizes"][where]
            shares = [_count_and_share(sizes[area], split["objects"]) for area in AREAS[1:]]
            table.add_row(name, where, *shares, *(_short((sizes["sqrt_area"] or {}).get(q)) for q in quantiles))
        spread = [_short((split["sizes"]["aspect_ratio"] or {}).get(q)) for q in quantiles]
        table.add_row(name, "aspect h/w", "", "", "", *spread)
    return table


def _count_and_share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.0%})" if total else "0"


def _short(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"


def _balance(splits: Mapping[str, Any]) -> Table:
    first = next(iter(splits.values()))
    categories = {c["id"]: c["name"] for split in splits.values() for c in split["categories"]}
    counts = {name: {c["id"]: c for c in split["categories"]} for name, split in splits.items()}
    order = sorted(categories, key=lambda k: -sum(split[k]["objects"] for split in counts.values() if k in split))
    shown = order if len(order) <= CATEGORIES else [*order[: CATEGORIES // 2], *order[-CATEGORIES // 2 :]]
    note = "" if len(order) == len(shown) else f"; the {CATEGORIES // 2} most and the {CATEGORIES // 2} least frequent"
    ratios = ", ".join(f"{name} {split['imbalance']:,.1f}" for name, split in splits.items() if split["imbalance"])
    title = f"{len(first['categories'])} categories; most / least frequent: {ratios or 'n/a'}{note}"
    table = _table(title, "category", *(f"{name}: {unit}" for name in splits for unit in ("objects", "images")))
    for key in shown:
        cells = [
            f"{split[key][unit]:,}" if key in split else "-" for split in counts.values() for unit in ("objects", "images")
        ]
        table.add_row(literal(categories[key]), *cells)
    return table


def _anchors(report: Mapping[str, Any]) -> Table:
    title = "What anchors can cover at best in the input, val; small, medium and large by native size\n"
    title += "% of objects with an anchor of IoU >= .5 / >= .7, mean best IoU"
    table = _table(title, "rows", "stride: anchor sides", *AREAS, text=2)
    rows: dict[str, list[str]] = {}  # rows of the same anchors stand in one line
    for row, anchors in report["anchors"].items():
        rows.setdefault(json.dumps(anchors), []).append(row)
    for anchors, names in rows.items():
        anchors = json.loads(anchors)
        levels = [f"{v['stride']:g}: {' '.join(f'{side:.4g}' for side in v['anchor_sizes'])}" for v in anchors["levels"]]
        table.add_row(", ".join(names), "\n".join(levels), *(_cover(anchors["recall"][area]) for area in AREAS))
    return table


def _cover(recall: Mapping[str, Any]) -> str:
    if not recall["objects"]:
        return "n/a"
    return f"{100 * recall['iou50']:.0f}/{100 * recall['iou70']:.0f} {recall['mean_best_iou']:.2f}"
