"""Draw detections of finished runs side by side: a line per image, the ground truth in front, then a column per run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fpn_ablate.config import user_parts
from fpn_ablate.config.schema import Config, Shapes
from fpn_ablate.engine.inputs import load_data, world
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.evaluation.display import MAX_PROPOSALS, MIN_SCORE
from fpn_ablate.report.formats.grid import clean
from fpn_ablate.runs.restore import load_detections, read_finished, refuse_changed_data
from fpn_ablate.structures.batch import DetectionDataset, Sample
from fpn_ablate.utils import hashing
from fpn_ablate.utils.errors import UserError

WIDTH = 2.6  # inches per column
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
        """Row, table, seed and the main metric, as the title of a column."""
        metrics = self.record["metrics"]
        figure = [f"{name} {100 * metrics[name]:.1f}" for name in ("AP", "AR1k") if metrics.get(name) is not None][:1]
        return "\n".join(_short(line, 34) for line in (self.cfg.row, f"{self.cfg.table}, seed {self.cfg.seed}", *figure))

    def select(self, image_id: int, threshold: float) -> np.ndarray:
        """Return the positions (D,) of the detections to draw in an image, best last, so that it ends on top."""
        selected = np.flatnonzero(self.detections.image_ids == image_id)
        selected = selected[np.argsort(self.detections.scores[selected], kind="stable")]
        if self.detections.labels is None:
            return selected[-MAX_PROPOSALS:]
        return selected[self.detections.scores[selected] >= threshold]


def common_split(runs: Sequence[FinishedRun]) -> DetectionDataset:
    """Load the split that all `runs` were evaluated on.

    Raises:
        UserError: the runs are on different data, or the data have changed.
    """
    first, images = runs[0], runs[0].record["images"]
    if others := [run.folder for run in runs if run.data_key != first.data_key]:
        raise UserError(f"{first.folder} and {others[0]}: different data (if it is one set in two places, give --root PATH)")
    if not isinstance(first.cfg.data, Shapes) and not Path(first.cfg.data.root).expanduser().is_dir():
        raise UserError(f"{first.cfg.data.root}: no such folder; give the data set's folder with --root PATH")
    _, dataset = load_data(first.cfg.data, first.cfg.recipe, first.cfg.mode, first.cfg.task.masks)
    if hashing.digest(list(dataset.image_ids[: images["count"]])) != images["digest"]:
        raise UserError(f"{dataset.name}: its images are not those on which {first.folder} was evaluated")
    for run in runs:
        refuse_changed_data(run.folder, run.record, val=dataset)
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
    for line, sample in zip(axes, samples, strict=True):
        line[0].set_ylabel(f"image {sample.image_id}", fontsize=7)
        for axis, run in zip(line, [None, *runs], strict=True):
            _picture(axis, sample, run, threshold, names)
    title = "GENERATED DATA" if dataset.generated else clean(dataset.name)
    figure.suptitle(title, fontsize=11, fontweight="bold", color=COLOURS[0] if dataset.generated else "black")
    legend = f"boxes with score >= {threshold:g} (of proposals: the best {MAX_PROPOSALS}); dashed: ground truth"
    figure.supxlabel(legend, fontsize=7)
    return figure


def _picture(axis: Axes, sample: Sample, run: FinishedRun | None, threshold: float, names: Sequence[str]) -> None:
    """Draw the ground truth alone, or the detections of `run` over it."""
    height, width = sample.image.shape[:2]
    axis.imshow(sample.image, extent=(0, width, height, 0), interpolation="nearest")
    axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    for box, label, crowd in zip(sample.boxes, sample.labels, sample.crowd, strict=True):
        if run is None:
            _box(axis, box, COLOURS[(label - 1) % len(COLOURS)], names[label - 1] + " (crowd)" * bool(crowd))
        else:
            _box(axis, box, "black", linewidth=0.9)  # white dashes alone are invisible on white
            _box(axis, box, "white", linewidth=0.6, linestyle=(0, (3, 3)))
    for n in run.select(sample.image_id, threshold) if run else ():
        label = 0 if run.detections.labels is None else run.detections.labels[n]
        text = f"{names[label - 1]} {run.detections.scores[n]:.2f}" if label else ""
        _box(axis, run.detections.boxes[n], COLOURS[(label - 1) % len(COLOURS)], text)


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


def _short(text: str, limit: int) -> str:
    """Clean a text, and cut it to `limit` characters."""
    text = clean(text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
