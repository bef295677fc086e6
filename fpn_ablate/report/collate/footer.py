"""Write a table's footer: data, images, evaluator, recipe, machine, code, and what was left out."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from statistics import fmean, median
from typing import Any

from fpn_ablate.report.collate.cells import Contrast
from fpn_ablate.report.collate.choose import describe_differences
from fpn_ablate.report.collate.definition import SIZES, Definition
from fpn_ablate.report.collate.stats import looks
from fpn_ablate.report.collate.table import GENERATED, Record, Row
from fpn_ablate.utils.console import coarse_duration

FAR_POINTS, FAR_SHARE = 5.0, 0.1  # seeds of a row are far apart if their range exceeds both, in points and of the mean
EFFECTS = "differences of rows (ours), taken seed by seed over the seeds that all rows of an effect have finished"
DIFFERENCES = "; p: of a difference from the baseline, two-sided, with Holm's correction over the rows"
NORMAL = "; seeds are taken for draws of one normal distribution, which a row that sometimes collapses is not"


def lines(
    definition: Definition,
    rows: Collection[Row],
    records: list[Record],
    others: list[list[Record]],
    left_out: list[str],
    unreadable: list[str],
    comparison: Iterable[tuple[str, str]] = (),
    unfair: bool = False,
    effects: str = "",
) -> list[tuple[str, str]]:
    """Return pairs (label, text): first what was measured and how, then what is missing.

    Args:
        records: those of the table's setting.
        others: the records of other settings, one list each.
        comparison: lines on the comparison of rows (`comparison_lines`).
        unfair: the rows include `others`.
        effects: how the table's effects were computed.
    """
    finished = [record for record in records if record["status"] == "finished"] or records
    first, paper = records[0], definition.paper
    generated = f": {GENERATED}" if any(record["generated"] for record in records) else ""
    pairs = [
        ("data", f"{first['data']}{generated}"),
        ("images", _tally(finished, _images)),
        ("objects", _tally(finished, _objects)),
        ("repairs", _tally(finished, _repairs)),
        ("evaluator", _tally(finished, lambda r: r.get("environment.evaluator"))),
        ("recipe", first["recipe"]),
        ("backbone", _tally(finished, _backbone)),
        ("training", _trained_on(finished)),
        ("seeds", _seeds(definition, rows)),
        ("same runs", _same_runs(rows)),
        ("±", _interval(definition, rows)),
        ("seeds far apart", _far_apart(definition, rows)),
        *comparison,
        ("device", _tally(finished, _device)),
        ("code", _tally(finished, _code)),
        ("user's parts", _user_parts(finished)),
        ("proposals", _proposals(finished)),
        ("cost", _cost(finished)),
        ("effects", effects),
        *(("note", note) for note in definition.notes),
        ("published", ". ".join(filter(None, (paper.reference, paper.settings))) if paper else ""),
        *(("left out", text) for text in left_out),
    ]
    for other in others:
        differences = describe_differences(records, other)
        differences = differences or "nothing that the records hold differs, so what the files of data or weights hold does"
        text = f"{len(other)} record{'s' * (len(other) > 1)} of another setting: {differences}"
        pairs.append(("UNFAIR" if unfair else "left out", text))
    if unreadable:
        pairs.append(("unreadable", f"{len(unreadable)} of the record files: {'; '.join(unreadable)}"))
    return [(label, text) for label, text in pairs if text]


def _images(record: Record) -> str | None:
    count, digest = record.get("images.count"), record.get("images.digest")
    return None if count is None else f"{count} evaluated, list {str(digest)[:12]}"


def _objects(record: Record) -> str | None:
    sizes = {key.removeprefix("objects."): value for key, value in record.items() if key.startswith("objects.")}
    order = [size for size in ("small", "medium", "large") if size in sizes]
    order += [size for size in sizes if size not in order]
    return ", ".join(f"{size} {sizes[size]}" for size in order if sizes[size] is not None) or None


def _repairs(record: Record) -> str | None:
    """Count the repairs of the annotations, by split."""
    splits: dict[str, list[str]] = {}
    for key, value in record.items():
        if key.startswith("repairs.") and value:
            split, _, repair = key.removeprefix("repairs.").partition(".")
            splits.setdefault(split, []).append(f"{repair} {value}")
    return "; ".join(f"{split}: {', '.join(parts)}" for split, parts in sorted(splits.items())) or None


def _backbone(record: Record) -> str | None:
    name = record.get("config.backbone.name") or record.get("config.backbone.class")
    weights = record.get("config.backbone.weights")
    if name is None:
        return None
    timm = name == "timm"
    name = f"timm/{record.get('config.backbone.model')}" if timm else name
    if record.get("config.mode") == "evaluate":
        return f"{name}; nothing was trained here, every row is the detector in the file that it names"
    accuracy, frozen = record.get("cost.pretrain_accuracy"), record.get("config.backbone.freeze_at")
    share = "" if accuracy is None else f", {accuracy:.0%} of held-out ones right".replace("%", " %")
    start = {
        "shipped": f"the package's weights, pre-trained on generated pictures{share}",
        "pretrain": f"pre-trained on generated pictures{share}",
        "imagenet": "the weights that timm has for it" if timm else "weights from ImageNet (torchvision)",
        "none": "random weights",
    }.get(weights, f"weights from the file {weights}")
    return f"{name}, {start}, freeze_at {frozen}"


def _device(record: Record) -> str | None:
    """Name the device, its precision and, for a CPU, the threads, which decide its latencies.

    The oldest records of Table 1 have no threads, and those before bf16 on CPUs do not say it.
    """
    device, threads = record.get("environment.device"), record.get("environment.threads")
    in_bf16 = ", convolutions in bf16" if record.get("bf16") is True else ""
    if threads is None or not str(device).startswith("cpu"):
        return device and device + in_bf16
    return f"{device}, {threads} thread{'s' * (threads > 1)} a run{in_bf16}"


def _code(record: Record) -> str | None:
    version, commit = record.get("environment.version"), record.get("environment.commit")
    if version is None and commit is None:
        return None
    dirty = " with uncommitted changes" if record.get("environment.dirty") else ""
    torch = f", torch {record['environment.torch']}" if record.get("environment.torch") else ""
    return f"version {version}, " + (f"commit {commit}{dirty}" if commit else "outside a git checkout") + torch


def _user_parts(records: list[Record]) -> str:
    """Name the user's classes by row: pan: the user's neck necks.PathAggregation."""
    keys = {"task.roi.head": "box head", "rpn.head": "RPN head", "task.proposals.neck": "neck for the proposals"}
    rows: dict[str, dict[str, None]] = {}
    for record in records:
        for column, name in sorted(record.items()):
            if column.startswith("user_parts.") and column.endswith(".class") and name is not None:
                key = column.removeprefix("user_parts.").removesuffix(".class")
                rows.setdefault(record["row"], {})[f"the user's {keys.get(key, key)} {name}"] = None
    return "; ".join(f"{row}: {', '.join(parts)}" for row, parts in sorted(rows.items()))


def _proposals(records: list[Record]) -> str:
    """Name the row whose RPN made the proposals, with the fingerprint of that run for each seed."""
    sources: dict[str, dict[int, set[str]]] = {}
    for record in records:
        row, fingerprint = record.get("proposals.row"), record.get("proposals.fingerprint")
        if row is not None:
            sources.setdefault(str(row), {}).setdefault(record["seed"], set()).add(str(fingerprint)[:8])
    texts = []
    for row, seeds in sorted(sources.items()):
        runs = (f"{'/'.join(sorted(fingerprints))} (seed {seed})" for seed, fingerprints in sorted(seeds.items()))
        texts.append(f"of row {row}'s RPN: {', '.join(runs)}")
    return "; ".join(texts)


def _seeds(definition: Definition, rows: Collection[Row]) -> str:
    finished = {row.row: row.seeds for row in rows if row.seeds}
    if not finished:
        return "none healthy" if any(row.shown for row in rows) else "none finished"
    if len(set(finished.values())) == 1:
        text = _numbers(next(iter(finished.values())))
    else:
        text = "NOT THE SAME FOR ALL ROWS: " + "; ".join(f"{row}: {_numbers(seeds)}" for row, seeds in finished.items())
    missing = sorted(set(definition.seeds) - {seed for row in rows for seed in row.states})
    return text + (f"; planned and not run: {_numbers(missing)}" if missing else "")


def comparison_lines(
    definition: Definition, contrasts: Iterable[Contrast], control: Row | None, noise: Mapping[str, float | None]
) -> list[tuple[str, str]]:
    """Return lines on how much variance pairing removed, and on how far equal rows differ by chance."""
    lines = []
    removed = [share for contrast in contrasts if (share := contrast.variance_removed) is not None and contrast.ours.n > 1]
    if removed:
        share = f"{median(removed):.0%}".replace("%", " %")
        lines.append(
            ("pairing", f"of the variance of a difference, equal seeds and images removed {share} (median of {len(removed)})")
        )
    if control is not None:
        limits = [f"{m.title} {value:.{m.digits}f}" for m in definition.metrics if (value := noise.get(m.key)) is not None]
        text = f"row {control.row} again with seeds {_numbers(control.states)} (A/A control)"
        if limits:
            text += f": equal rows stay closer than {', '.join(limits)} in 95 of 100 cases († marks less)"
        lines.append(("noise", text))
    elif definition.control is not None:
        overrides = f"ablation={definition.control.row} seed={','.join(map(str, definition.control.seeds))}"
        lines.append(("noise", f"not measured: add {overrides} to the table's command to train equal rows (A/A control)"))
    return lines


def looks_lines(definition: Definition, tested: bool) -> list[tuple[str, str]]:
    """Return a line on when differences are tested."""
    if not tested:
        return []
    if not definition.seeds:
        return [("p", "the definition plans no seeds: p-values hold only if nobody adds seeds after a look at them")]
    first, *further = (look.seeds for look in islice(looks(len(definition.seeds)), 3))
    again = f", again with {', with '.join(map(str, further))} and so on" if further else ""
    text = f"tested with the first {first} seeds{again}"
    return [("p", f"{text}; of the 5 % of false verdicts the first test has 4, all further ones together 1")]


def _interval(definition: Definition, rows: Iterable[Row]) -> str:
    """Say whether the cells' intervals are over seeds, images or both."""
    keys = [metric.key for metric in definition.metrics if metric.source is None]
    estimates = [estimate for row in rows for key in keys if (estimate := row.cells[key].ours).standard_error is not None]
    kinds = {(estimate.seed_variance is not None, estimate.image_variance is not None) for estimate in estimates}
    texts = {(True, True): "seeds and images", (True, False): "seeds alone", (False, True): "images alone (one seed)"}
    if not kinds:
        return ""
    text = f"half of the 95 % interval, over {', or '.join(texts[kind] for kind in sorted(kinds, reverse=True))}"
    return text + (NORMAL if any(over_seeds for over_seeds, _ in kinds) else "")


def _far_apart(definition: Definition, rows: Iterable[Row]) -> str:
    """Name the rows whose seeds are far apart, each with the metric over all sizes in which they are farthest.

    Columns of one size vary more, since they have fewer objects.
    """
    metrics = [m for m in definition.metrics if m.source is None and m.key.rpartition("_")[2] not in SIZES]
    texts = []
    for row in rows:
        wide = []
        for metric in metrics:
            values = sorted(value for value in row.cells[metric.key].values.values() if value is not None)
            width = values[-1] - values[0] if values else 0.0
            if width > FAR_POINTS and width > FAR_SHARE * fmean(values):
                wide.append((width, f"{row.row} {metric.title} {', '.join(f'{value:.{metric.digits}f}' for value in values)}"))
        texts += [max(wide)[1]] if wide else []
    return "; ".join(texts)


def _same_runs(rows: Iterable[Row]) -> str:
    """Name the rows that share runs: one experiment may have several names."""
    names: dict[str, list[str]] = {}
    for row in rows:
        for record in row.records:
            names.setdefault(record["fingerprint"], []).append(row.row)
    return "; ".join(sorted({" = ".join(sorted(shared)) for shared in names.values() if len(set(shared)) > 1}))


def _trained_on(records: list[Record]) -> str:
    shared = sum(bool(record.get("images.trained_on")) for record in records)
    return f"ON THE IMAGES OF THE EVALUATION ({shared} of {len(records)} runs): figures are too high" if shared else ""


def _cost(records: list[Record]) -> str:
    def seconds(key: str) -> list[float]:
        return [value for record in records if type(value := record.get(f"cost.{key}")) in (int, float)]

    records = list({record["fingerprint"]: record for record in records}.values())  # one run may have several names
    train, evaluate = seconds("train_s"), [*seconds("eval_s"), *seconds("proposals_s")]
    if not train:
        return ""
    runs = f"{len(records)} run{'s' * (len(records) > 1)}"
    trained = any(record.get("config.mode") != "evaluate" for record in records)
    text = f"{runs}: {f'training {coarse_duration(sum(train))}, ' * trained}evaluation {coarse_duration(sum(evaluate))}"
    resumed = sum(bool(record.get("cost.resumed_at")) for record in records)
    counts = "counts" if resumed == 1 else "count"
    text += f" ({resumed} went on after an interruption, and {counts} from there)" if resumed else ""
    # Rows that learn from one RPN's proposals share that run. It was trained once, and may be a row itself.
    sources = dict(pair for record in records for pair in record.get("built_on") or _one_source(record))
    others = set(sources) - {record["fingerprint"] for record in records}
    text += f"; runs that they stand on {coarse_duration(math.fsum(sources[name] for name in others))}" if others else ""
    # Rows share a pre-trained backbone: its time is spent once, and a run that read it from the cache may record 0.
    pretrain: dict[Any, float] = {}
    for record in records:
        if type(value := record.get("cost.pretrain_s")) in (int, float):
            weights = record.get("weights") or record.get("config.backbone.name")  # the oldest records have no digest
            pretrain[weights] = max(value, pretrain.get(weights, 0.0))
    total = math.fsum(pretrain.values())
    return text + (f"; pre-training {coarse_duration(total)}, shared" if total else "")


def _one_source(record: Record) -> list[tuple[str, float]]:
    """Return (fingerprint, seconds) of the source of a record that is older than the key `built_on`."""
    seconds = record.get("cost.sources_s")
    return [(str(record.get("proposals.fingerprint")), seconds)] if seconds else []


def _tally(records: list[Record], describe: Callable[[Record], str | None]) -> str:
    """Return the text on which all records agree, or each text with the number of records that have it."""
    texts = [text for record in records if (text := describe(record)) is not None]
    counts = {text: texts.count(text) for text in sorted(set(texts))}
    if len(counts) <= 1:
        return next(iter(counts), "")
    return "; ".join(f"{text} ({count} of {len(texts)} runs)" for text, count in counts.items())


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))
