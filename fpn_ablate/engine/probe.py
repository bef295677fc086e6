"""Linear probes: what a linear classifier reads off each feature level of a trained detector, at single places of pictures.

A classifier is fitted on places of training pictures and measured on those of validation pictures, one for each level and size
of objects. Two questions: is here the centre of an object, or background? Of which category is the object?
It finds what a level states outright, as the last layer of a head would; what takes more layers to work out counts as absent.

What counts as background decides what the first question asks. On the generated set it is centres of distractors: things of the
same size and look, so that only their meaning tells them from objects. Places outside all boxes are easy there (small objects
at P2, one seed of `quick`: 97.5 % right with and 96.2 % without the top-down path; among distractors 90.4 and 49.6 %), yet they
are all that another set has, so there they are drawn uniformly; on such a set the second question says more. Wrong proposals of
an RPN would be harder, but each network would be asked about its own mistakes, and rows could not be compared.

Shape letters: M places, d channels, I pictures, K classes, B bootstrap samples.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
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
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.seeding import numpy_generator

# Sides of a generated thing's box over those of its body, as world.py has it. On either side of 1.2 times the bounds the world
# draws objects and distractors in other shares; within other bounds, medium things could be told apart by their sides (66 %).
BOX_SIDE = 1.2
CANDIDATES = 1000  # places drawn in a picture, of which those in no box are background
QUESTIONS = ("object", "category")
FEWEST = 10  # places of an answer in a split; answers with fewer are left out


@dataclass(frozen=True)
class Places:
    """Places of pictures, in the order of the pictures.

    Attributes:
        pictures: (M,) positions of their pictures in the split.
        points: (M, 2) x, y in native pixels, centres of boxes; of generated things also their hidden parts count.
        labels: (M,) the category 1..K of the object whose centre it is; 0 is background.
        areas: (M,) the size of the object or distractor, a position in AREAS; 0 for a place outside all boxes.
    """

    pictures: np.ndarray
    points: np.ndarray
    labels: np.ndarray
    areas: np.ndarray


@dataclass(frozen=True)
class Accuracy:
    """Balanced accuracy in 0..1, the mean over classes of the share that is right, with its 95 % interval over pictures.

    It is 1 / `classes` by chance. `places`: how many it is measured on.
    """

    value: float
    low: float
    high: float
    classes: int
    places: int


def choose_places(dataset: DetectionDataset, split: str, count: int) -> Places:
    """Take the objects of `count` pictures, evenly spread over the split, and in each as many places of the background.

    Of distractors it takes as many as there are objects of their size, if the picture has them. Crowd regions are neither. The
    draw depends on `split` and the picture's id alone.

    Raises:
        UserError: the pictures have no object.
    """
    pictures = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist()
    find = _find_things if isinstance(dataset, ShapesDataset) else _find_boxes
    parts = []
    for picture, (points, labels, areas) in zip(pictures, find(dataset, pictures, split), strict=True):
        wanted = Counter(areas[labels > 0].tolist()) | Counter({0: max(1, (labels > 0).sum())})
        others = [np.flatnonzero((labels == 0) & (areas == area))[:number] for area, number in sorted(wanted.items())]
        chosen = np.concatenate([np.flatnonzero(labels), *others])
        parts.append((np.full(len(chosen), picture), points[chosen].astype(np.float32), labels[chosen], areas[chosen]))
    places = Places(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    if not places.labels.any():
        raise UserError(f"{dataset.name}, split {split!r}: no object in {len(pictures)} pictures; --pictures N probes more")
    return places


def _find_things(dataset: ShapesDataset, pictures: Sequence[int], split: str) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield points, labels and areas of each picture's objects and distractors, in random order and sized by the same rule."""
    for picture in pictures:
        *_, things, _ = compose(dataset.world, dataset.split, picture)
        rng = numpy_generator("probe", split, dataset.image_ids[picture])
        things = [things[n] for n in rng.permutation(len(things))]
        centers, halves = (np.reshape([getattr(thing, key) for thing in things], (-1, 2)) for key in ("center", "half"))
        labels = np.array([thing.label for thing in things], int)
        yield centers, labels, _sizes((2 * halves / BOX_SIDE).prod(1), dataset)


def _find_boxes(dataset: DetectionDataset, pictures: Sequence[int], split: str) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield points, labels and areas of each picture's objects and of places outside all boxes, in random order."""
    label_of = {category["id"]: n for n, category in enumerate(dataset.categories, start=1)}
    annotations = defaultdict(list)
    for annotation in dataset.coco()["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    for picture in pictures:
        of_picture = annotations[dataset.image_ids[picture]]
        low, side = np.hsplit(np.array([a["bbox"] for a in of_picture], float).reshape(-1, 4), 2)
        height, width = dataset.sizes[picture]
        rng = numpy_generator("probe", split, dataset.image_ids[picture])
        points = rng.random((CANDIDATES, 2)) * [width, height]
        points = points[~((points[:, None] >= low) & (points[:, None] < low + side)).all(2).any(1)]
        objects = [n for n, a in enumerate(of_picture) if not a.get("iscrowd")]
        labels = np.array([label_of[of_picture[n]["category_id"]] for n in objects], int)
        areas = _sizes(np.array([of_picture[n]["area"] for n in objects], float), dataset)
        outside = np.zeros(len(points), int)
        yield np.concatenate([(low + side / 2)[objects], points]), np.append(labels, outside), np.append(areas, outside)


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
        {level: {"small": {"object": accuracy, "category": accuracy}, "medium": ..., "large": ...}}; None where less than two
        answers have FEWEST places in both splits. Places of other answers are left out.
    """

    def measure(level: str, area: int, question: str) -> Accuracy | None:
        answers, expected = (_answers(at, area, question) for at in (training, validation))
        frequent = [n for n in np.unique(answers) if n >= 0 and min((answers == n).sum(), (expected == n).sum()) >= FEWEST]
        if len(frequent) < 2:
            return None
        fit, test = (np.flatnonzero(np.isin(of_split, frequent)) for of_split in (answers, expected))
        predicted = classify(of_training[level][fit], answers[fit], of_validation[level][test])
        return balanced_accuracy(expected[test], predicted, validation.pictures[test])

    return {
        level: {
            name: {question: measure(level, area, question) for question in QUESTIONS}
            for area, name in enumerate(AREAS)
            if area
        }
        for level in of_training
    }


def _answers(places: Places, area: int, question: str) -> np.ndarray:
    """Return the answers (M,) to a question about objects of a size; -1 where it is not put."""
    if question == "category":
        return np.where((places.areas == area) & (places.labels > 0), places.labels, -1)
    return np.where((places.areas == area) | (places.areas == 0), places.labels > 0, -1)


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
    with np.errstate(invalid="ignore"):  # a draw may lack a class whose places are in few pictures
        values = np.nanmean(times @ right / (times @ total), axis=1)
    low, high = np.percentile(values, [2.5, 97.5])
    value = (right.sum(0) / total.sum(0)).mean()
    return Accuracy(float(value), float(low), float(high), len(classes), len(labels))
