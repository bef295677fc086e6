"""Linear probes: what a linear classifier reads off each feature level of a trained detector, at single places of pictures.

A classifier is fitted on places of training pictures and measured on those of validation pictures, one for each level and size
of objects. Two questions: is here the centre of an object, or background? Of which category is the object?
It finds what a level states outright, as the last layer of a head would; what takes more layers to work out counts as absent.

What counts as background decides what the first question asks. On the generated set it is centres of distractors: things of the
same size and look, so that only their meaning tells them from objects. Places outside all boxes are easy there (P2 with and
without the top-down path: 97 and 96 % right on small objects; with distractors 91 and 50 %), yet they are all that another set
has, so there they are drawn uniformly; on such a set the second question says more. Wrong proposals of an RPN would be harder,
but each network would be asked about its own mistakes, and rows could not be compared.

Shape letters: M places, d channels, D distractors, I pictures, K classes, B bootstrap samples.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_ablate.config.schema import Recipe
from fpn_ablate.data.shapes import ShapesDataset, compose
from fpn_ablate.data.transforms import Resize, collate, prepare
from fpn_ablate.engine.train import autocast
from fpn_ablate.evaluation.bootstrap import bootstrap_indices
from fpn_ablate.evaluation.coco import AREAS
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.structures.batch import DetectionDataset
from fpn_ablate.structures.levels import Level
from fpn_ablate.utils.seeding import numpy_generator

BODY_SHARE = 0.7  # of its box that a distractor's body fills, about
CANDIDATES = 1000  # places drawn in a picture, of which those in no box are background
QUESTIONS = ("object", "category")
FEWEST = 10  # objects of a size in a split; with fewer nothing is fitted


@dataclass(frozen=True)
class Places:
    """Places of pictures, in the order of the pictures.

    Attributes:
        pictures: (M,) positions of their pictures in the split.
        points: (M, 2) x, y in native pixels.
        labels: (M,) the category 1..K of the object whose centre it is; 0 is background.
        areas: (M,) the size of the object or distractor, a position in AREAS; 0 for a place outside all boxes.
    """

    pictures: np.ndarray
    points: np.ndarray
    labels: np.ndarray
    areas: np.ndarray


@dataclass(frozen=True)
class Accuracy:
    """Balanced accuracy in 0..1, the mean over classes of the share that is right, with its 95 % interval over pictures."""

    value: float
    low: float
    high: float


def choose_places(dataset: DetectionDataset, split: str, count: int) -> Places:
    """Take the objects of `count` pictures, evenly spread over the split, and in each as many places of the background.

    Of distractors it takes as many as there are objects of their size, if the picture has them. Crowd regions are neither. The
    draw depends on `split` and the picture's id alone.
    """
    labels = {category["id"]: n for n, category in enumerate(dataset.categories, start=1)}
    annotations = defaultdict(list)
    for annotation in dataset.coco()["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    rows = []
    for picture in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist():
        of_picture = annotations[dataset.image_ids[picture]]
        low, side = np.hsplit(np.array([a["bbox"] for a in of_picture], float).reshape(-1, 4), 2)
        objects = [
            (picture, *center, labels[a["category_id"]], int(_sizes(a["area"], dataset)))
            for center, a in zip((low + side / 2).tolist(), of_picture, strict=True)
            if not a.get("iscrowd")
        ]
        points, areas = _candidates(dataset, picture, split)
        outside = ~((points[:, None] >= low) & (points[:, None] < low + side)).all(2).any(1)
        wanted = Counter(area for *_, area in objects) | Counter({0: max(1, len(objects))})
        chosen = [n for area in sorted(wanted) for n in np.flatnonzero(outside & (areas == area))[: wanted[area]]]
        rows += objects + [(picture, *points[n], 0, areas[n]) for n in chosen]
    pictures, x, y, labels_of_places, areas = (np.array(column) for column in zip(*rows, strict=True))
    return Places(pictures, np.column_stack([x, y]).astype(np.float32), labels_of_places, areas)


def _candidates(dataset: DetectionDataset, picture: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return places (D, 2) of a picture in random order that are background unless they lie in a box, and their sizes (D,)."""
    rng = numpy_generator("probe", split, dataset.image_ids[picture])
    if isinstance(dataset, ShapesDataset):
        *_, things, _ = compose(dataset.world, dataset.split, picture)
        distractors = [things[n] for n in rng.permutation(len(things)) if not things[n].label]
        centers, halves = (np.reshape([getattr(d, key) for d in distractors], (-1, 2)) for key in ("center", "half"))
        return centers, _sizes(BODY_SHARE * 4 * halves.prod(1), dataset)
    height, width = dataset.sizes[picture]
    return rng.random((CANDIDATES, 2)) * [width, height], np.zeros(CANDIDATES, int)


def _sizes(areas: np.ndarray, dataset: DetectionDataset) -> np.ndarray:
    """Return 1 small, 2 medium, 3 large of areas in square native pixels."""
    return 1 + np.searchsorted(dataset.area_bounds, areas)


@torch.no_grad()
def features_at(
    model: Detector, dataset: DetectionDataset, places: Places, recipe: Recipe, device: torch.device
) -> dict[str, Tensor]:
    """Return the features (M, d) of each of the neck's levels at `places`, interpolated between cells, on the CPU."""
    columns = defaultdict(list)
    pictures = np.unique(places.pictures).tolist()
    for start in range(0, len(pictures), recipe.eval_batch_size):
        chunk = pictures[start : start + recipe.eval_batch_size]
        batch = collate([prepare(dataset[picture], Resize.of(recipe), flip=False) for picture in chunk]).to(device)
        with autocast(recipe.bf16, device):
            levels = model.features(batch.images, batch.sizes)
        for n, picture in enumerate(chunk):
            scale = batch.sizes[n].cpu().numpy() / dataset.sizes[picture]
            points = torch.from_numpy(places.points[places.pictures == picture] * scale[::-1].astype(np.float32)).to(device)
            for name, maps in levels.items():
                columns[name].append(sample_map(maps[n].float(), points, Level(name, len(maps[n])).stride).cpu())
    return {name: torch.cat(parts) for name, parts in columns.items()}


def sample_map(level: Tensor, points: Tensor, stride: int) -> Tensor:
    """Interpolate a map (d, h, w) at points (P, 2), x and y in pixels of the network's input: (P, d)."""
    height, width = level.shape[1:]
    grid = 2 * points / (points.new_tensor([width, height]) * stride) - 1
    return F.grid_sample(level[None], grid[None, None], padding_mode="border", align_corners=False)[0, :, 0].T


def probe(
    training: Places, of_training: dict[str, Tensor], validation: Places, of_validation: dict[str, Tensor]
) -> dict[str, dict[str, dict[str, Accuracy | None]]]:
    """Fit classifiers on the places and features of one split, and measure them on those of the other.

    Returns:
        {level: {"small": {"object": accuracy, "category": accuracy}, "medium": ..., "large": ...}}; None where a split has
        fewer than FEWEST objects of the size, or the two share less than two answers.
    """

    def measure(level: str, area: int, question: str) -> Accuracy | None:
        if min(((at.areas == area) & (at.labels > 0)).sum() for at in (training, validation)) < FEWEST:
            return None
        (fit, answers), (test, expected) = (_ask(at, area, question) for at in (training, validation))
        known = np.isin(expected, answers)
        test, expected = test[known], expected[known]
        if len(np.unique(expected)) < 2:
            return None
        predicted = classify(of_training[level][fit], answers, of_validation[level][test])
        return balanced_accuracy(expected, predicted, validation.pictures[test])

    return {
        level: {
            name: {question: measure(level, area, question) for question in QUESTIONS}
            for area, name in enumerate(AREAS)
            if area
        }
        for level in of_training
    }


def _ask(places: Places, area: int, question: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the places that a question about objects of a size is put to, and the answers."""
    if question == "category":
        chosen = np.flatnonzero((places.areas == area) & (places.labels > 0))
        return chosen, places.labels[chosen]
    chosen = np.flatnonzero((places.areas == area) | (places.areas == 0))
    return chosen, places.labels[chosen] > 0


def classify(features: Tensor, labels: np.ndarray, others: Tensor) -> np.ndarray:
    """Fit a multinomial logistic regression on features (M, d) and labels (M,), and return its labels of `others` (M', d).

    Every class has the same weight in all. The penalty is scikit-learn's default (C = 1, on features of deviation 1), which
    makes the solution unique: no start and no seed decides it.
    """
    classes, targets = np.unique(labels, return_inverse=True)
    y, count = torch.from_numpy(targets), len(labels)
    weight = (count / len(classes) / torch.bincount(y).double())[y]
    x = features.double()
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-9)
    x = (x - mean) / deviation
    coefficients = x.new_zeros(len(classes), x.shape[1]).requires_grad_()
    bias = x.new_zeros(len(classes)).requires_grad_()
    optimizer = torch.optim.LBFGS([coefficients, bias], max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        losses = F.cross_entropy(F.linear(x, coefficients, bias), y, reduction="none")
        value = ((losses * weight).sum() + coefficients.square().sum() / 2) / count
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return classes[F.linear((others.double() - mean) / deviation, coefficients, bias).argmax(1).numpy()]


def balanced_accuracy(labels: np.ndarray, predicted: np.ndarray, pictures: np.ndarray) -> Accuracy:
    """Measure predictions (M,) of `labels`; the interval is a bootstrap's over `pictures`, whose places are not independent."""
    classes, y = np.unique(labels, return_inverse=True)
    images, image = np.unique(pictures, return_inverse=True)
    right, total = np.zeros((2, len(images), len(classes)))
    np.add.at(total, (image, y), 1)
    np.add.at(right, (image, y), labels == predicted)
    draws = bootstrap_indices(len(images), numpy_generator("probe", "bootstrap"))
    times = np.stack([np.bincount(draw, minlength=len(images)) for draw in draws])  # (B, I)
    with np.errstate(invalid="ignore"):  # a class that a draw lacks
        values = np.nanmean(times @ right / (times @ total), axis=1)
    low, high = np.percentile(values, [2.5, 97.5])
    return Accuracy(float((right.sum(0) / total.sum(0)).mean()), float(low), float(high))
