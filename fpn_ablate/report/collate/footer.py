"""What a reader must know to trust a table: data, images, evaluator, recipe, machine, code, and what was left out."""

import json
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from fpn_ablate.config.factors import under
from fpn_ablate.config.schema import INCIDENTAL
from fpn_ablate.report.collate.cells import Contrast
from fpn_ablate.report.collate.definition import Definition
from fpn_ablate.report.collate.records import factors_of
from fpn_ablate.report.collate.table import GENERATED, Record, Row

# Keys of a configuration that are no part of a setting.
ELSEWHERE = ("seed", *INCIDENTAL)
# What else can set two settings apart, beside the configuration.
CIRCUMSTANCES = (
    "images.count",
    "images.digest",
    "weights",
    "environment.evaluator",
    "environment.version",
    "environment.commit",
    "environment.device",
    "environment.torch",
    "deterministic",
    "code",
)
SHOWN_DIFFERENCES = 6
EFFECTS = "differences of rows (ours), taken seed by seed over the seeds that all rows of an effect have finished"


def lines(
    definition: Definition,
    rows: Iterable[Row],
    ours: list[Record],
    others: list[list[Record]],
    left_out: list[str],
    unreadable: list[str],
    compared: Iterable[tuple[str, str]] = (),
    unfair: bool = False,
) -> list[tuple[str, str]]:
    """Pairs (label, text): first what was measured and how, then what is missing.

    `compared` are lines on the comparison of rows (`comparison`); `unfair`: `others` stand among the rows.
    """
    finished = [record for record in ours if record["status"] == "finished"] or ours
    pairs = [
        ("data", _data(ours)),
        ("images", _images(finished)),
        ("objects", _each(finished, _objects)),
        ("repairs", _each(finished, _repairs)),
        ("evaluator", _each(finished, lambda r: r.get("environment.evaluator"))),
        ("recipe", ours[0]["recipe"]),
        ("backbone", _each(finished, _backbone)),
        ("seeds", _seeds(definition, rows)),
        ("±", _interval(definition, rows)),
        *compared,
        ("device", _each(finished, _device)),
        ("code", _each(finished, _code)),
        ("proposals", _proposals(finished)),
        ("cost", _cost(finished)),
        ("effects", EFFECTS if definition.effects else ""),
        *(("note", note) for note in definition.notes),
        ("published", _published(definition)),
        *(("left out", text) for text in left_out),
        *(("UNFAIR" if unfair else "left out", _other_setting(ours, other)) for other in others),
    ]
    if unreadable:
        pairs.append(("unreadable", f"{len(unreadable)} of the record files: {'; '.join(unreadable)}"))
    return [(label, text) for label, text in pairs if text]


def differing_keys(these: list[Record], those: list[Record], factors: bool = False) -> dict[str, tuple[Any, Any]]:
    """Keys for which the two groups of records share no value, with both values; row factors only on request.

    Keys are shown without `config.`; a missing value is None.
    """
    keys = sorted({key for record in (*these, *those) for key in record if key.startswith("config.")})
    declared = () if factors else declared_factors([*these, *those])
    keys = [key for key in keys if key.split(".")[1] not in ELSEWHERE and not under(key, declared, "config.")]
    differing = {}
    if declared_factors(these) != declared_factors(those):
        differing["factors"] = (", ".join(declared_factors(these)), ", ".join(declared_factors(those)))
    for key in (*keys, *CIRCUMSTANCES):
        here, there = _values(these, key), _values(those, key)
        if not here & there:
            differing[key.removeprefix("config.")] = (_join(sorted(here)), _join(sorted(there)))
    return differing


def declared_factors(records: Iterable[Record]) -> tuple[str, ...]:
    """The factors that any of the records declares."""
    return tuple(sorted({factor for record in records for factor in factors_of(record)}))


def differences(ours: list[Record], others: list[Record], factors: bool = False, versus: str = ", here ") -> str:
    """The keys for which two groups share no value, the others' value first; empty if there are none."""
    differing = differing_keys(ours, others, factors)
    parts = [f"{key} {there}{versus}{here}" for key, (here, there) in list(differing.items())[:SHOWN_DIFFERENCES]]
    if len(differing) > SHOWN_DIFFERENCES:
        parts.append(f"and {len(differing) - SHOWN_DIFFERENCES} more keys")
    return "; ".join(parts)


def _values(records: list[Record], key: str) -> set[str]:
    return {json.dumps(record.get(key), sort_keys=True) for record in records}


def _other_setting(ours: list[Record], other: list[Record]) -> str:
    what = differences(ours, other) or "nothing that the records hold differs, so what the files of data or weights hold does"
    return f"{len(other)} record{'s' * (len(other) > 1)} of another setting: {what}"


def _data(records: list[Record]) -> str:
    generated = any(record["generated"] for record in records)
    return f"{records[0]['data']}: {GENERATED}" if generated else records[0]["data"]


def _images(records: list[Record]) -> str:
    def text(record: Record) -> str | None:
        count, digest = record.get("images.count"), record.get("images.digest")
        return None if count is None else f"{count} evaluated, list {str(digest)[:12]}"

    return _each(records, text)


def _objects(record: Record) -> str | None:
    sizes = {key.removeprefix("objects."): value for key, value in record.items() if key.startswith("objects.")}
    order = [size for size in ("small", "medium", "large") if size in sizes]
    order += [size for size in sizes if size not in order]
    return ", ".join(f"{size} {sizes[size]}" for size in order if sizes[size] is not None) or None


def _repairs(record: Record) -> str | None:
    """Counts of what was changed in the annotations, by split."""
    splits: dict[str, list[str]] = {}
    for key, value in record.items():
        if key.startswith("repairs.") and value:
            split, dot, what = key.removeprefix("repairs.").partition(".")
            splits.setdefault(split if dot else "", []).append(f"{what or split} {value}")
    return "; ".join(f"{split}: {', '.join(parts)}".removeprefix(": ") for split, parts in sorted(splits.items())) or None


def _backbone(record: Record) -> str | None:
    name, weights = record.get("config.backbone.name"), record.get("config.backbone.weights")
    if name is None:
        return None
    timm = name == "timm"
    name = f"timm/{record.get('config.backbone.model')}" if timm else name
    if record.get("config.mode") == "evaluate":
        return f"{name}; nothing was trained here, every row is the detector in the file that it names"
    right, frozen = record.get("cost.pretrain_accuracy"), record.get("config.backbone.freeze_at")
    share = "" if right is None else f", {right:.0%} of held-out ones right".replace("%", " %")
    start = {
        "pretrain": f"pre-trained on generated pictures{share}",
        "imagenet": "the weights that timm has for it" if timm else "weights from ImageNet (torchvision)",
        "none": "random weights",
    }.get(weights, f"weights from the file {weights}")
    return f"{name}, {start}, freeze_at {frozen}"


def _device(record: Record) -> str | None:
    """With the threads of a CPU, by which its latencies are to be read; records of Table 1's first version have none."""
    device, threads = record.get("environment.device"), record.get("environment.threads")
    if threads is None or not str(device).startswith("cpu"):
        return device
    return f"{device}, {threads} thread{'s' * (threads > 1)} a run"


def _code(record: Record) -> str | None:
    version, commit = record.get("environment.version"), record.get("environment.commit")
    if version is None and commit is None:
        return None
    dirty = " with uncommitted changes" if record.get("environment.dirty") else ""
    torch = f", torch {record['environment.torch']}" if record.get("environment.torch") else ""
    return f"version {version}, " + (f"commit {commit}{dirty}" if commit else "outside a git checkout") + torch


def _proposals(records: list[Record]) -> str:
    """Whose RPN made the proposals, with the fingerprint of that run for each seed."""
    sources: dict[str, dict[int, set[str]]] = {}
    for record in records:
        row, fingerprint = record.get("proposals.row"), record.get("proposals.fingerprint")
        if row is not None:
            sources.setdefault(str(row), {}).setdefault(record["seed"], set()).add(str(fingerprint)[:8])
    texts = []
    for row, seeds in sorted(sources.items()):
        runs = (f"{'/'.join(sorted(found))} (seed {seed})" for seed, found in sorted(seeds.items()))
        texts.append(f"of row {row}'s RPN: {', '.join(runs)}")
    return "; ".join(texts)


def _seeds(definition: Definition, rows: Iterable[Row]) -> str:
    seeds = {row.row: row.seeds for row in rows if row.seeds}
    if not seeds:
        return "none finished"
    if len(set(seeds.values())) == 1:
        text = _numbers(next(iter(seeds.values())))
    else:
        text = "NOT THE SAME FOR ALL ROWS: " + "; ".join(f"{row}: {_numbers(found)}" for row, found in seeds.items())
    missing = sorted(set(definition.seeds) - {seed for found in seeds.values() for seed in found})
    return text + (f"; the definition also asks for {_numbers(missing)}" if missing else "")


def comparison(
    definition: Definition, contrasts: Iterable[Contrast], control: Row | None, noise: Mapping[str, float | None]
) -> list[tuple[str, str]]:
    """What pairing did for the differences, and what differences mean nothing."""
    lines = []
    removed = [share for contrast in contrasts if (share := contrast.removed) is not None and contrast.ours.n > 1]
    if removed:
        share = f"{median(removed):.0%}".replace("%", " %")
        lines.append(
            ("pairing", f"of the variance of a difference, equal seeds and images removed {share} (median of {len(removed)})")
        )
    if control is not None:
        known = [f"{m.title} {value:.{m.digits}f}" for m in definition.metrics if (value := noise.get(m.key)) is not None]
        text = f"row {control.row} again with seeds {_numbers(control.states)} (A/A control)"
        lines.append(
            (
                "noise",
                f"{text}: equal rows stay closer than {', '.join(known)} in 95 of 100 cases († marks less)" if known else text,
            )
        )
    elif definition.control is not None:
        wanted = f"ablation={definition.control.row} seed={','.join(map(str, definition.control.seeds))}"
        lines.append(("noise", f"no A/A control has been run; the command of the table with {wanted} added does"))
    return lines


def _interval(definition: Definition, rows: Iterable[Row]) -> str:
    """What the intervals of the cells are over."""
    own = [metric.key for metric in definition.metrics if metric.source is None]
    cells = [row.cells[key].ours for row in rows for key in own]
    over = {(cell.seeds is not None, cell.images is not None) for cell in cells if cell.error is not None}
    words = {(True, True): "seeds and images", (True, False): "seeds alone", (False, True): "images alone (one seed)"}
    if not over:
        return ""
    return f"half of the 95 % interval, over {', or '.join(words[kind] for kind in sorted(over, reverse=True))}"


def _cost(records: list[Record]) -> str:
    def seconds(key: str) -> list[float]:
        return [value for record in records if type(value := record.get(f"cost.{key}")) in (int, float)]

    train, evaluate, pretrain = seconds("train_s"), [*seconds("eval_s"), *seconds("proposals_s")], seconds("pretrain_s")
    if not train:
        return ""
    runs = f"{len(records)} run{'s' * (len(records) > 1)}"
    text = f"{runs}: training {_minutes(sum(train))}, evaluation {_minutes(sum(evaluate))}"
    resumed = sum(bool(record.get("cost.resumed_at")) for record in records)
    text += f" ({resumed} went on after an interruption, and count from there)" if resumed else ""
    # Rows that learn from one RPN's proposals stand on the same run, which was trained once, and may be rows themselves.
    sources = dict(pair for record in records for pair in record.get("built_on") or _one_source(record))
    others = set(sources) - {record["fingerprint"] for record in records}
    text += f"; runs that they stand on {_minutes(sum(sources[name] for name in others))}" if others else ""
    # Rows share the pre-trained backbone: its time is paid once, and a run that found it cached may record 0.
    return text + (f"; pre-training {_minutes(max(pretrain))}, shared" if any(pretrain) else "")


def _one_source(record: Record) -> list[tuple[str, float]]:
    """Of a record that is older than the key `built_on`."""
    seconds = record.get("cost.sources_s")
    return [(str(record.get("proposals.fingerprint")), seconds)] if seconds else []


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _published(definition: Definition) -> str:
    paper = definition.paper
    return ". ".join(part for part in (paper.reference, paper.settings) if part) if paper else ""


def _each(records: list[Record], text: Any) -> str:
    """What all records agree on, or every answer with the number of records that give it."""
    found = [value for record in records if (value := text(record)) is not None]
    counts = {value: found.count(value) for value in sorted(set(found))}
    if len(counts) <= 1:
        return next(iter(counts), "")
    return "; ".join(f"{value} ({count} of {len(found)} runs)" for value, count in counts.items())


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _join(values: list[str]) -> str:
    return "/".join(value.strip('"') if value != "null" else "unset" for value in values)
