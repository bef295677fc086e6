"""Print what rows are: as a table on the terminal, or as Markdown for a README."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from fpn_ablate.model.summary import CLASSES, DETECTIONS, PAPER_SIZE, ROIS, RowFacts


def show(rows: Mapping[str, RowFacts], size: tuple[int, int]) -> None:
    """Print the rows as a table."""
    with_head, two_stage, masks, pyramids = (
        any(getattr(facts, key) for facts in rows.values()) for key in ("head", "proposals", "mask", "image_pyramid")
    )
    with_rpn = two_stage or not all(facts.head for facts in rows.values())
    columns = ["row", *(["proposals"] if two_stage else []), "feature"]
    columns += [*(["head"] if with_head else []), *(["mask head"] if masks else [])]
    columns += [*(["image scales"] if pyramids else []), "lateral?", "top-down?", "finest level sees"]
    parts = ["backbone", "neck", *(["rpn"] if with_rpn else [])]
    parts += [*(["head"] if with_head else []), *(["mask"] if masks else [])]
    title = f"Rows, one image of {size[0]} x {size[1]} pixels"
    title += f", {ROIS:,} RoIs, {CLASSES} classes" if two_stage else ""
    table = Table(title=title + (f", masks of {DETECTIONS} detections" if masks else ""))
    for column in columns:
        table.add_column(column, no_wrap=column == "row")
    for column in [
        "# anchors" if with_rpn else "# regions",
        "parameters",
        "trained",
        *(f"GFLOPs\n{part.replace('rpn', 'RPN')}" for part in [*parts, "total"]),
    ]:
        table.add_column(column, justify="right")
    for row, facts in rows.items():
        marks = ["✓" if on else "" for on in (facts.lateral, facts.top_down)]
        proposals, head = [facts.proposals] if two_stage else [], [facts.head] if with_head else []
        head += [*([facts.mask] if masks else []), *([facts.image_pyramid] if pyramids else [])]
        gflops = [*(getattr(facts, f"gflops_{part}") for part in parts), facts.gflops]
        counts = [
            *(f"{n:,}" if n else "" for n in (facts.anchors, facts.params, facts.trained)),
            *(f"{x:,.1f}" for x in gflops),
        ]
        table.add_row(row, *proposals, facts.feature, *head, *marks, " ".join(facts.reach), *counts)
    Console(width=max(200 if masks or pyramids else 180, Console().width)).print(table)


def markdown(rows: Mapping[str, RowFacts], size: tuple[int, int] = PAPER_SIZE) -> str:
    """Return a Markdown table of what each row costs, for a README; parts that no row has are left out."""
    titles = {"backbone": "backbone", "neck": "neck", "rpn": "RPN", "head": "head", "mask": "masks"}
    parts = [part for part in titles if any(getattr(facts, f"gflops_{part}") for facts in rows.values())]
    header = ["row", "parameters (M)", *(titles[part] for part in parts), "total", "neck / backbone"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row, facts in rows.items():
        gmac = [getattr(facts, f"gflops_{part}") / 2 for part in parts]
        figures = [facts.params / 1e6, *gmac, facts.gflops / 2]
        share = f"{facts.gflops_neck / facts.gflops_backbone:.0%}" if facts.gflops_neck else ""
        lines.append([row, *(f"{x:.1f}" if x else "" for x in figures), share])
    two_stage = any(facts.proposals for facts in rows.values())
    head = f", the head on {ROIS:,} RoIs and {CLASSES} classes, without RoI pooling" if two_stage else ""
    head += f", masks of {DETECTIONS} detections" if "mask" in parts else ""
    unit = f"Cost in GMAC (1e9 multiply-adds: GFLOPs / 2) for one image of {size[0]} x {size[1]}{head}."
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{unit}\n"
