"""Fill the pages' tables of rows, tables, recipes, switches, verdicts and the cost of the evidence: `python docs/reference.py`.

They are made from `conf/`, `experiments/`, the configuration's schema and the committed records, and stand in a page between
`<!-- generated: NAME -->` and `<!-- /generated -->`.
A key's default and meaning are those of its file in `conf/`; what it may be is what the schema accepts.
"""

import csv
import re
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter

from fpn_ablate.config import parts, schema, tasks
from fpn_ablate.config.comments import introduction, keys_of
from fpn_ablate.report.formats.grid import p_text, varies
from fpn_ablate.utils.blocks import fill_blocks
from fpn_ablate.utils.paths import CONF, EXPERIMENTS

ROOT = Path(__file__).resolve().parents[1]
REFERENCE, PAGES = ROOT / "results" / "reference", ROOT / "docs" / "pages"
# Group: the heading, and the model of the whole group or models of which `name` chooses one.
GROUPS = {
    "data": ("Data", schema.Shapes | schema.Coco),
    "backbone": ("Backbone", parts.Backbone | parts.PlainBackbone | parts.TimmBackbone),
    "neck": ("Neck", parts.BuiltInNeck),
    "image_pyramid": ("Image pyramid", parts.ImagePyramidConfig),
    "rpn": ("RPN", parts.RPNConfig),
    "task": ("Task", tasks.Task),
    "roi": ("Second stage", parts.RoI),
    "mask": ("Mask branch", parts.MaskConfig),
    "recipe": ("Recipe", schema.Recipe),
    "log": ("Log", schema.Log),
}
PREFIX = {"roi": "task.roi", "mask": "task.mask"}  # where a group stands in the configuration, unless under its own name
SKIPPED = {"recipe": lambda name: name != "quick", "backbone": lambda name: name.startswith("eighth/")}
RECIPE_KEYS = (
    *(
        "short_side",
        "max_side",
        "channels",
        "batch_size",
        "steps",
        "optimizer.name",
        "optimizer.lr",
        "optimizer.backbone_lr_factor",
    ),
    *("schedule.warmup_steps", "schedule.drops", "bf16", "roi.steps", "roi.samples", "roi.pooling"),
)


def models(annotation: Any) -> list[type[BaseModel]]:
    """Return the models within a type, as `Shapes | Coco`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models(argument)]


def allowed(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """Return in words what a field accepts."""
    wrapped = annotation
    for item in metadata:
        wrapped = Annotated[wrapped, item]
    return _words(TypeAdapter(wrapped).json_schema())


def _words(made: dict[str, Any]) -> str:
    if "$ref" in made or made.get("type") == "object":
        return "a class of yours"
    if "anyOf" in made or "oneOf" in made:
        return " \\| ".join(dict.fromkeys(_words(part) for part in made.get("anyOf") or made["oneOf"]))
    if "enum" in made or "const" in made:
        return " \\| ".join(
            f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in made.get("enum", [made.get("const")])
        )
    kind = made.get("type")
    if kind == "array":
        items = made.get("prefixItems")
        return f"{len(items)} x {_words(items[0])}" if items else f"list of {_words(made['items'])}"
    words = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true` \\| `false`", "null": "`null`"}
    text = words.get(kind, "any")
    low = made.get("minimum", made.get("exclusiveMinimum"))
    if low is not None:
        text += f" {'≥' if 'minimum' in made else '>'} {low:g}"
    high = made.get("maximum")
    return text + (f", ≤ {high:g}" if high is not None and high <= 10**5 else "")


def cell(text: str) -> str:
    """Return a text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def model_of(group: str, name: str | None) -> type[BaseModel]:
    """Return the model of a group's file, by the `name` in it."""
    for model in (found := models(GROUPS[group][1])):
        field = model.model_fields.get("name")
        if len(found) == 1 or (field and name in get_args(field.annotation)):
            return model
    raise KeyError(f"{group}: no model has the name {name}")


def field_of(model: type[BaseModel], key: str) -> Any:
    """Return the field of a dotted key; None where a group of its own stands."""
    first, _, rest = key.partition(".")
    field = model.model_fields.get(first)
    if field is None or not rest:
        return field
    inner = models(field.annotation)
    return field_of(inner[0], rest) if inner else None


def _table(group: str, file: Path) -> str:
    keys = list(keys_of(file))
    values = {key: value for key, value, _ in keys}
    model = model_of(group, values.get("name")) if group else schema.Config
    prefix = f"{PREFIX.get(group, group)}." if group else ""
    lines = []
    for key, value, note in keys:
        if key.startswith(("defaults", "hydra", "_")) or (key == "name" and group != "recipe"):
            continue
        field = field_of(model, key)
        accepts = allowed(field.annotation, tuple(field.metadata)) if field is not None and value else ""
        lines.append(
            f"| `{prefix}{key}` | {f'`{value}`'.replace('|', chr(92) + '|') if value else ''} | {accepts} | {cell(note)} |"
        )
    head = ["| key | default | accepts | meaning |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *lines]) + "\n" if lines else ""


def switches() -> str:
    """Return the tables of all keys: those of a run, then each group's."""
    text = ["## A run\n", _table("", CONF / "config.yaml")]
    for group, (heading, _) in GROUPS.items():
        text.append(f"## {heading}: `{PREFIX.get(group, group)}`\n")
        seen: dict[str, list[str]] = {}
        for file in sorted((CONF / group).rglob("*.yaml")):
            name = file.relative_to(CONF / group).with_suffix("").as_posix()
            if SKIPPED.get(group, lambda _: False)(name):
                continue
            choice = name if group in PREFIX else f"{group}={name}"
            keys = [key for key, _, _ in keys_of(file)]
            if ("defaults" in keys and "name" not in keys) or keys == [group]:  # what differs from another file
                text.append(f"`{choice}`: {introduction(file)}\n")
                continue
            keys = _table(group, file)
            if group == "backbone":  # most have the same keys
                seen.setdefault(re.sub(r"\| `(imagenet|pretrain|shipped)` \|", "| of the backbone |", keys), []).append(name)
                continue
            text += [f"### `{choice}`\n", introduction(file) + "\n", keys]
        for keys, names in seen.items():
            text += ["### " + ", ".join(f"`{name}`" for name in names) + "\n", keys]
    return "\n".join(text)


def rows() -> str:
    """Return the table of all rows."""
    lines = ["| row | what it is |", "| --- | --- |"]
    for file in sorted((CONF / "ablation").rglob("*.yaml")):
        name = file.relative_to(CONF / "ablation").with_suffix("").as_posix()
        lines.append(f"| `{name}` | {cell(introduction(file))} |")
    return "\n".join(lines) + "\n"


def tables() -> str:
    """Return the table of all definitions in experiments/: what they show, their rows and what they cost."""
    lines = ["| `+experiments=` | what it shows | rows | cost |", "| --- | --- | --- | --- |"]
    for file in sorted(EXPERIMENTS.glob("*.yaml")):
        definition = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(definition, dict) or "report" not in definition:
            continue
        head = [line.lstrip("# ") for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        cost = re.search(r"\bcost\s{2,}(.*?)(?= (?:on COCO|\w+)\s{2,}|$)", " ".join(head))
        params = (definition.get("hydra") or {}).get("sweeper", {}).get("params", {})
        names = ", ".join(f"`{row.strip()}`" for row in str(params.get("ablation", "")).split(",") if row.strip())
        parameters = "; ".join(f"`{key}={value}`" for key, value in params.items() if key not in ("ablation", "seed"))
        title = definition["report"]["title"]
        shown = "<br>".join(part for part in (names, parameters) if part)
        lines.append(f"| `{file.stem}` | {cell(title)} | {shown} | {cell(cost[1].strip()) if cost else ''} |")
    return "\n".join(lines) + "\n"


def recipes() -> str:
    """Return a table of the recipes' numbers, composed as a run composes them."""
    from fpn_ablate.config.composition import compose

    names = sorted(file.stem for file in (CONF / "recipe").glob("*.yaml"))
    composed = {name: compose([f"recipe={name}", "data=coco", "data.root=x"]) for name in names}
    lines = ["| | " + " | ".join(f"`{name}`" for name in names) + " |", "| --- |" + " --- |" * len(names)]
    for key in ("backbone", *RECIPE_KEYS):
        shown = []
        for cfg in composed.values():
            value: Any = cfg.backbone.label if key == "backbone" else cfg.recipe
            for name in key.split(".") if key != "backbone" else ():
                value = getattr(value, name)
            shown.append(
                ", ".join(f"{x:g}" for x in value)
                if isinstance(value, tuple)
                else f"{value:g}"
                if isinstance(value, float)
                else str(value)
            )
        lines.append(f"| {f'`{key}`' if key == 'backbone' else f'`recipe.{key}`'} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def verdicts() -> str:
    """Return the claims that the committed tables on generated data judge, where they have the seeds that were planned."""
    lines = [
        "| table | claim | metric | ours | published | verdict | p (Holm) |",
        "| --- | --- | --- | ---: | ---: | --- | ---: |",
    ]
    for file in sorted((REFERENCE / "tables").glob("*-shapes-*-claims.csv")):
        with file.open(encoding="utf-8", newline="") as rows_of_file:
            claims = [claim for claim in csv.DictReader(rows_of_file) if claim["look"]]
        for claim in claims:
            mean, low, high = (float(claim[name]) for name in ("mean", "low", "high"))
            published = f"{float(claim['published']):+.1f}" if claim["published"] else "ours only"
            metric = claim["metric"] + (f" beyond {claim['less']}" if claim["less"] else "")
            ours, interval = f"{round(mean, 1) + 0.0:+.1f}", f" ± {(high - low) / 2:.1f}"  # + 0.0: no -0.0
            if claim["ratio"] == "true":
                ours, interval = f"x {mean:.2f}", f" ({low:.2f} to {high:.2f})"
            ours += interval if varies(high - low) else ""
            recipe = claim["recipe"].split("+")[0]
            table = f"`{claim['table']}`" + (f", {recipe}" if recipe != "quick" else "")
            p = cell(p_text(float(claim["p_holm"]))) if claim["p_holm"] else ""
            lines.append(f"| {table} | {cell(claim['claim'])} | {metric} | {ours} | {published} | {claim['verdict']} | {p} |")
    return "\n".join(lines) + "\n"


def evidence() -> str:
    """Return what the evidence was planned to cost, and what its finished runs have cost, in minutes of one core.

    A run in several tables is counted in the first one, and a pre-training, which many runs share, once.
    """
    planned = yaml.safe_load((ROOT / "results" / "evidence.yaml").read_text(encoding="utf-8"))
    with (REFERENCE / "ledger.csv").open(encoding="utf-8", newline="") as file:
        done = [run for run in csv.DictReader(file) if run["code"] == planned["code"] and run["status"] == "finished"]
    counted: set[str] = set()
    figures = []
    for entry in [*planned["plan"], {"table": "sources", "recipe": "quick", "data": "shapes", "runs": 0, "minutes": 0}]:
        place = entry["table"], entry["recipe"], entry["data"]
        runs = [run for run in done if (run["table"], run["recipe"].split("+")[0], run["data"]) == place]
        new = [run for run in runs if run["fingerprint"] not in counted]
        counted |= {run["fingerprint"] for run in new}
        seconds = sum(float(run[f"cost.{part}_s"] or 0) for run in new for part in ("train", "eval", "proposals"))
        name = "runs that others build on" if place[0] == "sources" else f"`{place[0]}`"
        figures.append((f"{name} | {place[1]} | {place[2]}", entry["runs"], entry["minutes"], len(runs), seconds / 60))
    pretrained = {(run["config.backbone.name"], run["data"], float(run["cost.pretrain_s"] or 0)) for run in done}
    figures.append(("pre-training, shared | | ", 0, 0, 0, sum(seconds for *_, seconds in pretrained) / 60))
    lines = [
        "| table | recipe | data | runs planned | minutes planned | runs done | minutes spent |",
        "| --- " * 3 + "| ---: " * 4 + "|",
    ]
    lines += [f"| {name} | " + " | ".join(f"{figure:,.0f}" for figure in entry) + " |" for name, *entry in figures]
    sums = [sum(column) for column in zip(*(entry for _, *entry in figures), strict=True)]
    hours = [f"{total:,.0f}" if n % 2 == 0 else f"{total:,.0f} ({total / 60:.1f} h)" for n, total in enumerate(sums)]
    return "\n".join([*lines, f"| all | | | {' | '.join(hours)} |"]) + "\n"


TABLES = {"switches": switches, "rows": rows, "tables": tables, "recipes": recipes, "verdicts": verdicts, "evidence": evidence}
FILLED = (*sorted(PAGES.rglob("*.md")), ROOT / "results" / "README.md")


def filled(text: str) -> str:
    """Return the text of a page with its generated tables as they are now."""
    if "<!-- generated: " not in text:
        return text
    return fill_blocks(text, "generated: NAME", lambda name: f"\n{TABLES[name]()}\n")


if __name__ == "__main__":
    for page in FILLED:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
