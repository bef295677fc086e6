"""Report on a data set before a sweep: `python -m fpn_ablate doctor data=coco data.root=PATH ...`.

It examines both splits as the run would see them. `describe_data` returns one dictionary, which `--json` writes:

    format          1; raised when a key changes its meaning
    data, generated, invalid, keep_empty      the data set, and how bad boxes and empty images are treated
    recipe          {name, short_side, max_side}
    sound           whether a run would start
    refused         reasons that concern both splits
    warnings        [{kind, split, text}]: no reasons to refuse a run; `split` is train, val or null (both)
    splits          {train, val}: null values if the annotation file, or its boxes, cannot be read
      annotations, image_folder    paths; null for generated pictures
      findings      [{kind, level, refused, file, image_id, annotation_id, value, count, fix}], see data/checks/findings.py
      repairs       {kind of repair: objects} that data.invalid changes
      images, images_used, images_without_objects, objects, crowd, crowd_share
      objects_an_image    {mean, median, max, above_100}
      sizes         native and input: {bounds, small, medium, large, sqrt_area}; aspect_ratio (height / width),
                    below_one_pixel, below_finest_stride, finest_stride: of the input. Quantiles are min, q05, ... q95, max.
      categories    [{id, name, objects, images}], imbalance: most frequent / rarest that has objects
      duplicates    {annotations, annotation_ids, file_names, shared_file_names}
    shared_images   {by_name_and_size: [{file_name, train, val}], by_content: [{train, val}]}, ids of images in both splits
    anchors         row of the task's table, or of --config-dir -> {levels, ratios, recall}: of the validation objects at the
                    recipe's input size; recall[all | small | medium | large] = {objects, iou50, iou70, mean_best_iou}: the
                    share whose best anchor has at least that IoU; by native size, as AR and AP of tables; null without objects

Objects are annotations that are not crowd. Only `sound` decides the exit code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fpn_ablate.config.schema import Coco, Config
from fpn_ablate.data.transforms import Resize
from fpn_ablate.doctor import facts
from fpn_ablate.doctor.recall import AnchorSet, anchors_of, best_iou, input_sizes
from fpn_ablate.doctor.splits import Split, splits_of
from fpn_ablate.evaluation.coco import AREAS
from fpn_ablate.weights.backbone import missing_download

FORMAT = 1
# Kind: its text, with the number of cases and the first of them in place of {}.
WARNINGS = {
    "corners": "boxes that leave their image: {}, more than half of all; are they [x1, y1, x2, y2]? COCO's are "
    "[x, y, width, height]",
    "category-without-objects": "categories without an object: {}",
    "duplicate-annotations": "ids of annotations that repeat image, category and box of another: {}; remove them",
    "duplicate-file-names": "file names that several images share: {}",
    "crowded": "images with more than 100 objects: {}; AR100, and AP of one category, cannot count all of them",
    "below-one-pixel": "objects less than a pixel high or wide in the input: {}; raise recipe.short_side, or remove them",
    "below-finest-stride": "objects smaller in the input than a cell of the finest level: {}; a larger recipe.short_side helps",
    "shared-content": "images that train has too, byte for byte (ids train = val): {}; scores would be too high: remove them",
    "shared-name": "file names with the same size in both splits, but other bytes: {}; perhaps versions of one picture",
    "anchors": "rows and sizes where less than half of the objects have an anchor of IoU >= 0.5: {}; raise recipe.short_side, "
    "or choose other rpn.anchor_sizes or a row of finer stride",
    "download": "the first run downloads ImageNet's weights, once: {}; without a network give backbone.weights=FILE",
}


def describe_data(rows: Mapping[str, Config]) -> dict[str, Any]:
    """Describe the data that rows share (row -> configuration; they differ in the neck alone).

    Raises:
        UserError: data.root is no folder.
    """
    cfg = next(iter(rows.values()))
    splits, reasons = splits_of(cfg)
    anchors = {row: anchors_of(row_cfg) for row, row_cfg in rows.items()}
    finest = min(stride for levels, _ in anchors.values() for stride, _ in levels)
    is_coco = isinstance(cfg.data, Coco)
    report = {
        "format": FORMAT,
        "data": cfg.data_name,
        "generated": any(split.table is not None and split.table.generated for split in splits),
        "invalid": cfg.data.invalid if is_coco else None,
        "keep_empty": cfg.data.keep_empty if is_coco else None,
        "recipe": {"name": cfg.recipe.name, "short_side": cfg.recipe.short_side, "max_side": cfg.recipe.max_side},
        "sound": not reasons and not any(split.refused for split in splits),
        "refused": reasons,
        "splits": {split.name: _split_facts(split, cfg, finest) for split in splits},
        "shared_images": None,
        "anchors": {},
    }
    train, val = splits
    # Generated pictures of the two splits cannot coincide: their seeds differ.
    if is_coco and train.table is not None and val.table is not None:
        report["shared_images"] = facts.shared_images(train, val)
    if val.table is not None:
        with_anchors = {row: (levels, ratios) for row, (levels, ratios) in anchors.items() if ratios}
        report["anchors"] = _recalls(val, cfg, with_anchors)
    report["warnings"] = _warnings(report, missing_download(cfg.backbone))
    return report


def _split_facts(split: Split, cfg: Config, finest_stride: int) -> dict[str, Any]:
    """Collect the facts of one split; null values if its file cannot be read."""
    refused = set(map(id, split.refused))
    head = {
        "annotations": split.report.annotations_file,
        "image_folder": split.report.image_folder,
        "findings": [vars(f) | {"level": f.level, "refused": id(f) in refused, "fix": f.fix} for f in split.report.findings],
        "repairs": split.repairs,
    }
    table = split.table
    if table is None:
        return head | dict.fromkeys(("images", "objects", "sizes", "categories", "imbalance", "duplicates"))
    objects = table.select(~table.crowd)
    categories = facts.category_facts(objects)
    return {
        **head,
        **facts.image_facts(table, split.keep_empty),
        "sizes": facts.size_facts(objects, input_sizes(table.sizes, Resize.of(cfg.recipe)), split.bounds, finest_stride),
        "categories": categories,
        "imbalance": facts.imbalance(categories),
        "duplicates": facts.duplicate_facts(table),
    }


def _recalls(val: Split, cfg: Config, rows: Mapping[str, AnchorSet]) -> dict[str, Any]:
    """Compute how well the anchors of each row cover the objects, by size."""
    objects = val.table.select(~val.table.crowd)
    sizes = input_sizes(objects.sizes, Resize.of(cfg.recipe))
    boxes = torch.from_numpy(facts.input_boxes(objects, sizes))
    images = torch.from_numpy(sizes[objects.image_index])
    classes = facts.size_classes(objects.areas, val.bounds)
    best = {anchor_set: best_iou(boxes, images, anchor_set).numpy() for anchor_set in dict.fromkeys(rows.values())}
    return {
        row: {
            "levels": [{"stride": stride, "anchor_sizes": list(sides)} for stride, sides in levels],
            "ratios": list(ratios),
            "recall": {
                "all": _recall(best[levels, ratios]),
                **{area: _recall(best[levels, ratios][classes == k]) for k, area in enumerate(AREAS[1:])},
            },
        }
        for row, (levels, ratios) in rows.items()
    }


def _recall(best: np.ndarray) -> dict[str, Any]:
    """Summarise the best IoUs of some objects."""
    if not len(best):
        return {"objects": 0, "iou50": None, "iou70": None, "mean_best_iou": None}
    shares = {f"iou{round(100 * t)}": round(float((best >= t).mean()), 6) for t in (0.5, 0.7)}
    return {"objects": len(best), **shares, "mean_best_iou": round(float(best.mean(dtype=np.float64)), 6)}


def _warnings(report: dict[str, Any], download: str | None) -> list[dict[str, Any]]:
    """Return the WARNINGS that have cases: of each split, of both together (None), of the anchors, and of weights."""
    cases: list[tuple[str, str | None, Sequence[Any] | int | str]] = []
    for name, split in report["splits"].items():
        if split["images"] is None:
            continue
        outside = sum(finding["count"] for finding in split["findings"] if finding["kind"] == "box-outside")
        boxes = split["objects"] + split["crowd"] + (0 if report["invalid"] == "clip" else outside)  # also those left out
        missing = [category["name"] for category in split["categories"] if not category["objects"]]
        cases += [
            ("corners", name, outside if 2 * outside > boxes else 0),
            ("category-without-objects", name, missing),
            ("duplicate-annotations", name, split["duplicates"]["annotation_ids"]),
            ("duplicate-file-names", name, split["duplicates"]["shared_file_names"]),
            ("crowded", name, split["objects_an_image"]["above_100"]),
            ("below-one-pixel", name, split["sizes"]["below_one_pixel"]),
            ("below-finest-stride", name, split["sizes"]["below_finest_stride"]),
        ]
    if shared := report["shared_images"]:
        by_content = shared["by_content"]
        # Images with the same bytes are not counted again.
        others = [pair for pair in shared["by_name_and_size"] if {k: pair[k] for k in ("train", "val")} not in by_content]
        cases.append(("shared-content", None, [f"{pair['train']} = {pair['val']}" for pair in by_content]))
        cases.append(("shared-name", None, [pair["file_name"] for pair in others]))
    poor: dict[str, list[str]] = {}  # rows with the same anchors stand together
    for row, anchors in report["anchors"].items():
        for area in AREAS[1:]:
            recall = anchors["recall"][area]
            if recall["objects"] and recall["iou50"] < 0.5:
                poor.setdefault(f"{recall['iou50']:.0%} of the {recall['objects']:,} {area} objects", []).append(row)
    cases.append(("anchors", "val", [f"{share} in {', '.join(rows)}" for share, rows in poor.items()]))
    cases.append(("download", None, download or ""))
    return [
        {"kind": kind, "split": split, "text": WARNINGS[kind].format(_counted(those))} for kind, split, those in cases if those
    ]


def _counted(cases: Sequence[Any] | int | str) -> str:
    """Count cases, and quote the first five."""
    if isinstance(cases, int | str):
        return str(cases)
    more = f" and {len(cases) - 5} more" if len(cases) > 5 else ""
    return f"{len(cases)} ({', '.join(map(str, cases[:5]))}{more})"
