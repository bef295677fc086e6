"""What finished runs found, side by side: one line an image, the ground truth alone in front, then one column a run."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fpn_ablate.config.schema import Config, Shapes
from fpn_ablate.config.validation import load_saved_config
from fpn_ablate.engine.inputs import load_data, world
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.report.formats.grid import clean
from fpn_ablate.store import record
from fpn_ablate.structures.batch import DetectionDataset, Sample
from fpn_ablate.utils import hashing
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.paths import DETECTIONS

PROPOSALS = 20  # an image; their scores order them, and are not held against the threshold of a class
WIDTH = 2.6  # inches a column
# Okabe and Ito; the first three suit the generated set's red, green and blue. More classes begin again: names tell them apart.
COLOURS = ("#D55E00", "#009E73", "#0072B2", "#E69F00", "#56B4E9", "#CC79A7")


@dataclass(frozen=True)
class FinishedRun:
    """A finished run as its folder holds it."""

    folder: Path
    cfg: Config
    record: dict[str, Any]
    found: DetectionSet

    @staticmethod
    def load(folder: Path, root: str | None = None) -> "FinishedRun":
        """`root` replaces data.root. Raises UserError: no record, not finished, or a file that cannot be read."""
        known = record.read(folder)
        if not known:
            raise UserError(f"{folder}: no record.json that can be read; name the folder of one run, .../seed<k>-<digits>")
        if known["status"] != "finished":
            raise UserError(f"{folder}: the run is not finished but {known['status']}; start it again, and it goes on")
        try:
            cfg = load_saved_config(folder / "config.yaml")
            found = DetectionSet.load(folder / DETECTIONS)
            if not len(found.image_ids) == len(found.scores) == len(found.boxes.reshape(-1, 4)):
                raise ValueError("its arrays differ in length")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, yaml.YAMLError, UserError) as error:
            raise UserError(f"{folder}: config.yaml or detections.npz cannot be read ({error})") from None
        if root is not None:
            if isinstance(cfg.data, Shapes):
                raise UserError(f"--root: {folder} is on generated data, which lie in no folder; leave it out")
            cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"root": root})})
        return FinishedRun(folder, cfg, known, found)

    @property
    def data(self) -> tuple:
        """Equal for runs that were evaluated on the same images."""
        data, images = self.cfg.data, self.record["images"]
        return (
            world(data, self.cfg.recipe.short_side) if isinstance(data, Shapes) else (data.root, data.val),
            images["count"],
            images["digest"],
        )

    @property
    def heading(self) -> str:
        metrics = self.record["metrics"]
        figure = [f"{name} {100 * metrics[name]:.1f}" for name in ("AP", "AR1k") if metrics.get(name) is not None][:1]
        return "\n".join(_short(line, 34) for line in (self.cfg.row, f"{self.cfg.table}, seed {self.cfg.seed}", *figure))

    def best(self, image_id: int, threshold: float) -> np.ndarray:
        """(D,) which detections to draw in an image, worst first, so that the best ends on top."""
        own = np.flatnonzero(self.found.image_ids == image_id)
        own = own[np.argsort(self.found.scores[own], kind="stable")]
        return own[-PROPOSALS:] if self.found.labels is None else own[self.found.scores[own] >= threshold]


def common_split(runs: Sequence[FinishedRun]) -> DetectionDataset:
    """The split that all `runs` were evaluated on. Raises UserError: different data, or not what it was."""
    first, images = runs[0], runs[0].record["images"]
    if others := [run.folder for run in runs if run.data != first.data]:
        raise UserError(f"{first.folder} and {others[0]}: different data (if one set lay in two places: --root PATH)")
    if not isinstance(first.cfg.data, Shapes) and not Path(first.cfg.data.root).expanduser().is_dir():
        raise UserError(f"{first.cfg.data.root}: no such folder; --root PATH tells where the data set lies now")
    _, dataset = load_data(first.cfg.data, first.cfg.recipe, first.cfg.mode)
    if hashing.digest(list(dataset.image_ids[: images["count"]])) != images["digest"]:
        raise UserError(f"{dataset.name}: its images are not those that {first.folder} was evaluated on")
    for run in runs:
        if run.found.labels is not None and not set(run.found.labels) <= set(range(1, len(dataset.categories) + 1)):
            raise UserError(f"{run.folder}: detections of classes that {dataset.name} does not have")
    return dataset


def draw(runs: Sequence[FinishedRun], count: int = 4, threshold: float = 0.5) -> Figure:
    """The sheet, `count` images spread evenly over those evaluated. Raises UserError as `evaluated`."""
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
    rule = f"boxes of a score of {threshold:g} or more (of proposals: the best {PROPOSALS}); dashed: ground truth"
    figure.supxlabel(rule, fontsize=7)
    return figure


def _picture(axis: Axes, sample: Sample, run: FinishedRun | None, threshold: float, names: Sequence[str]) -> None:
    """The ground truth alone, or what `run` found upon it."""
    height, width = sample.image.shape[:2]
    axis.imshow(sample.image, extent=(0, width, height, 0), interpolation="nearest")
    axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    for box, label, crowd in zip(sample.boxes, sample.labels, sample.crowd, strict=True):
        if run is None:
            _box(axis, box, COLOURS[(label - 1) % len(COLOURS)], names[label - 1] + " (crowd)" * bool(crowd))
        else:
            _box(axis, box, "black", linewidth=0.9)  # white dashes alone would be lost on white
            _box(axis, box, "white", linewidth=0.6, linestyle=(0, (3, 3)))
    for n in run.best(sample.image_id, threshold) if run else ():
        label = 0 if run.found.labels is None else run.found.labels[n]
        text = f"{names[label - 1]} {run.found.scores[n]:.2f}" if label else ""
        _box(axis, run.found.boxes[n], COLOURS[(label - 1) % len(COLOURS)], text)


def _box(axis: Axes, box: np.ndarray, colour: str, text: str = "", **style: Any) -> None:
    x0, y0, x1, y1 = box.tolist()
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, **{"linewidth": 1.4, **style}))
    if text:
        # Above the box and from its left; at the picture's border inside, or from its right, or it would be cut off.
        vertical = "top" if y0 < 0.06 * axis.get_ylim()[0] else "bottom"
        x, horizontal = (x1, "right") if x0 > 0.75 * axis.get_xlim()[1] else (x0, "left")
        style = {"fontsize": 5, "color": "white", "va": vertical, "ha": horizontal, "clip_on": True}
        ground = {"facecolor": colour, "edgecolor": "none", "pad": 0.4, "alpha": 0.85}
        axis.text(x, y0, text, bbox=ground, zorder=0.9, **style)  # below all boxes: where objects crowd, it would hide them


def _short(text: str, limit: int) -> str:
    text = clean(text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
