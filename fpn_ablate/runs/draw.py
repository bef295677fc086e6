"""Draw detections of finished runs side by side: a line per image, the ground truth in front, then a column per run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline

from fpn_ablate.config import user_parts
from fpn_ablate.config.schema import Config, Shapes
from fpn_ablate.engine.inputs import load_data, world
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.evaluation.display import MATCHED_PROPOSALS, MAX_PROPOSALS, MIN_SCORE, closest
from fpn_ablate.report.formats.grid import clean
from fpn_ablate.runs.restore import load_detections, read_finished, refuse_changed_data
from fpn_ablate.structures.batch import DetectionDataset, Sample
from fpn_ablate.utils import hashing
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.outlines import outlines
from fpn_ablate.utils.rle import Size

WIDTH = 2.6  # inches per column
# Of ground truth on a run's picture; white dashes alone are invisible on white.
BLACK = {"colour": "black", "linewidth": 0.9}
DASHES = {"colour": "white", "linewidth": 0.6, "linestyle": (0, (3, 3))}
# Okabe and Ito; the first three suit the generated set's red, green and blue. With more classes they repeat; names differ.
COLOURS = ("#D55E00", "#009E73", "#0072B2", "#E69F00", "#56B4E9", "#CC79A7")


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, read from its folder."""

    folder: Path
    cfg: Config
    record: dict[str, Any]
    detections: DetectionSet

    @staticmethod
    def load(folder: Path, root: str | None = None, config_dir: Path | None = None) -> "FinishedRun":
        """Read a run.

        Args:
            root: replaces data.root.
            config_dir: the user's parts in it must be those that the run was made from. None of them is imported.

        Raises:
            UserError: the run has no record or is not finished, a file cannot be read, or a part has changed.
        """
        cfg, content = read_finished(folder, config_dir)
        if config_dir:
            user_parts.refuse_changed(cfg.user_parts, content, folder)
        detections = load_detections(folder)
        if root is not None:
            if isinstance(cfg.data, Shapes):
                raise UserError(f"--root: {folder} is on generated data, which have no folder; leave out --root")
            cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"root": root})})
        return FinishedRun(folder, cfg, content, detections)

    @property
    def data_key(self) -> tuple:
        """Identify the evaluated images: equal for runs that were evaluated on the same."""
        data, images = self.cfg.data, self.record["images"]
        return (
            world(data, self.cfg.recipe.short_side) if isinstance(data, Shapes) else (data.root, data.val),
            images["count"],
            images["digest"],
        )

    @property
    def heading(self) -> str:
        """Row, table, seed and the main metric, as the title of a column; with masks both AP."""
        metrics = self.record["metrics"]
        figures = [
            f"{name.replace('AR', 'AR@')} {100 * metrics[name]:.1f}" for name in ("AP", "AR1k") if metrics.get(name) is not None
        ][:1]
        if metrics.get("mask_AP") is not None:
            figures = [", ".join([*figures, f"mask AP {100 * metrics['mask_AP']:.1f}"])]
        return "\n".join(_short(line, 34) for line in (self.cfg.row, f"{self.cfg.table}, seed {self.cfg.seed}", *figures))

    def select(self, sample: Sample, threshold: float) -> np.ndarray:
        """Return the positions (D,) of the detections to draw in an image, best last, so that it ends on top."""
        selected = np.flatnonzero(self.detections.image_ids == sample.image_id)
        selected = selected[np.argsort(self.detections.scores[selected], kind="stable")]
        if self.detections.labels is not None:
            return selected[self.detections.scores[selected] >= threshold]
        if self.detections.masks is None or sample.masks is None:
            return selected[-MAX_PROPOSALS:]
        objects = [mask for mask, crowd in zip(sample.masks, sample.crowd, strict=True) if not crowd]
        selected = selected[-MATCHED_PROPOSALS:]
        return selected[closest(objects, [self.detections.masks[n] for n in selected], sample.image.shape[:2])]


def common_split(runs: Sequence[FinishedRun]) -> DetectionDataset:
    """Load the split that all `runs` were evaluated on, with masks if a run needs them.

    Raises:
        UserError: the runs are on different data, or the data have changed.
    """
    first, images = runs[0], runs[0].record["images"]
    if others := [run.folder for run in runs if run.data_key != first.data_key]:
        raise UserError(f"{first.folder} and {others[0]}: different data (if it is one set in two places, give --root PATH)")
    if not isinstance(first.cfg.data, Shapes) and not Path(first.cfg.data.root).expanduser().is_dir():
        raise UserError(f"{first.cfg.data.root}: no such folder; give the data set's folder with --root PATH")
    # Read with masks, a set has another digest than without.
    splits = {run.cfg.task.masks: run.cfg for run in runs}
    splits = {masks: load_data(cfg.data, cfg.recipe, cfg.mode, masks)[1] for masks, cfg in splits.items()}
    dataset = splits[max(splits)]
    if hashing.digest(list(dataset.image_ids[: images["count"]])) != images["digest"]:
        raise UserError(f"{dataset.name}: its images are not those on which {first.folder} was evaluated")
    for run in runs:
        refuse_changed_data(run.folder, run.record, val=splits[run.cfg.task.masks])
        if run.detections.labels is not None and run.detections.labels.max(initial=0) > len(dataset.categories):
            raise UserError(f"{run.folder}: detections of classes that {dataset.name} does not have")
    return dataset


def draw(runs: Sequence[FinishedRun], count: int = 4, threshold: float = MIN_SCORE) -> Figure:
    """Draw `count` images, evenly spread over those evaluated.

    Raises:
        UserError: as `common_split`.
    """
    dataset, total = common_split(runs), runs[0].record["images"]["count"]
    samples = [dataset[int(i)] for i in np.linspace(0, total - 1, min(count, total)).round()]
    names = [_short(category["name"], 20) for category in dataset.categories]
    ratios = [sample.image.shape[0] / sample.image.shape[1] for sample in samples]
    figure = Figure(figsize=(WIDTH * (1 + len(runs)), 0.97 * WIDTH * sum(ratios) + 1.1), layout="constrained")
    axes = figure.subplots(len(samples), 1 + len(runs), squeeze=False, height_ratios=ratios)
    for axis, heading in zip(axes[0], ["ground truth", *(run.heading for run in runs)], strict=True):
        axis.set_title(heading, fontsize=8)
    masks = any(run.detections.masks is not None for run in runs)
    for line, sample in zip(axes, samples, strict=True):
        line[0].set_ylabel(f"image {sample.image_id}", fontsize=7)
        for axis, run in zip(line, [None, *runs], strict=True):
            with_masks = masks if run is None else run.detections.masks is not None
            _picture(axis, sample if with_masks else replace(sample, masks=None), run, threshold, names)
    title = "GENERATED DATA" if dataset.generated else clean(dataset.name)
    figure.suptitle(title, fontsize=11, fontweight="bold", color=COLOURS[0] if dataset.generated else "black")
    shown = f"boxes{' and masks' * masks} with score >= {threshold:g} (of proposals: the best {MAX_PROPOSALS}"
    if any(run.detections.recall_by == "segm" for run in runs):
        shown += f",\nor of their masks, among the best {MATCHED_PROPOSALS}, those that match an object best"
    figure.supxlabel(f"{shown}); dashed: ground truth", fontsize=7)
    return figure


def _picture(axis: Axes, sample: Sample, run: FinishedRun | None, threshold: float, names: Sequence[str]) -> None:
    """Draw the ground truth alone, or the detections of `run` over it, with masks if `sample` has them."""
    height, width = size = sample.image.shape[:2]
    axis.imshow(sample.image, extent=(0, width, height, 0), interpolation="nearest")
    axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    masks = sample.masks if sample.masks is not None else [None] * len(sample.boxes)
    for box, label, crowd, mask in zip(sample.boxes, sample.labels, sample.crowd, masks, strict=True):
        if run is None:
            colour = COLOURS[(label - 1) % len(COLOURS)]
            _box(axis, box, colour, names[label - 1] + " (crowd)" * bool(crowd))
            if mask is not None:
                _mask(axis, mask, size, colour)
        else:
            for style in (BLACK, DASHES):
                _box(axis, box, **style) if mask is None else _outline(axis, mask, size, **style)
    for n in run.select(sample, threshold) if run else ():
        label = 0 if run.detections.labels is None else run.detections.labels[n]
        colour = COLOURS[(label - 1) % len(COLOURS)]
        if run.detections.masks is not None:
            _mask(axis, run.detections.masks[n], size, colour)
        if run.detections.recall_by == "bbox":
            _box(axis, run.detections.boxes[n], colour, f"{names[label - 1]} {run.detections.scores[n]:.2f}" if label else "")


def _box(axis: Axes, box: np.ndarray, colour: str, text: str = "", **style: Any) -> None:
    """Draw a box and its label."""
    x0, y0, x1, y1 = box.tolist()
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, **{"linewidth": 1.4, **style}))
    if text:
        # Above the box, aligned left. Near the picture's border: inside the box, or aligned right, so that nothing is cut off.
        vertical = "top" if y0 < 0.06 * axis.get_ylim()[0] else "bottom"
        x, horizontal = (x1, "right") if x0 > 0.75 * axis.get_xlim()[1] else (x0, "left")
        style = {"fontsize": 5, "color": "white", "va": vertical, "ha": horizontal, "clip_on": True}
        background = {"facecolor": colour, "edgecolor": "none", "pad": 0.4, "alpha": 0.85}
        axis.text(x, y0, text, bbox=background, zorder=0.9, **style)  # below all boxes: it would hide crowded objects


def _mask(axis: Axes, counts: bytes, size: Size, colour: str) -> None:
    """Draw a mask's outline and fill it, below texts and boxes."""
    _outline(axis, counts, size, colour, fill=True, facecolor=(colour, 0.35), linewidth=0.9, zorder=0.8)


def _outline(axis: Axes, counts: bytes, size: Size, colour: str, fill: bool = False, **style: Any) -> None:
    parts = [Outline(polygon, closed=True) for polygon in outlines(counts, size)]
    if parts:
        axis.add_patch(PathPatch(Outline.make_compound_path(*parts), fill=fill, edgecolor=colour, **style))


def _short(text: str, limit: int) -> str:
    """Clean a text, and cut it to `limit` characters."""
    text = clean(text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
