"""Each image gets its own proposals, best first, and nothing else of the data set changes."""

import pickle
from dataclasses import fields

import numpy as np
import pytest
import torch
from coco_sets import base, write

from fpn_ablate.data.coco import CocoDataset
from fpn_ablate.data.loader import evaluation_batches, training_batches
from fpn_ablate.data.proposals import WithProposals
from fpn_ablate.data.transforms import Resize
from fpn_ablate.structures.batch import DetectionDataset, Sample
from fpn_ablate.utils.errors import UserError

IDS = [42, 7, 9, 100, 3]  # in no order, as a file may have them


class Pictures:
    name, generated, digest, box_digest, has_masks = "pictures", True, "0123", "0123", False
    categories, area_bounds, image_ids = [{"id": 3, "name": "ant"}], (16.0**2, 48.0**2), IDS
    sizes = np.array([[32 + index, 40] for index in range(len(IDS))])

    def __len__(self):
        return len(IDS)

    def __getitem__(self, index):
        image = np.full((32 + index, 40, 3), index, np.uint8)
        boxes = np.array([[1, 2, 11 + index, 12]], np.float32)
        return Sample(image, boxes, np.ones(1, np.int64), np.zeros(1, bool), IDS[index])

    def coco(self):
        return {"images": [{"id": key, "height": 32, "width": 40} for key in IDS], "annotations": [], "categories": []}


def proposals(seed=0, count=200, ids=(42, 9, 100, 3)):
    """(image_ids, boxes); image 7 has none. The first coordinate is the rank of a proposal among all."""
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(0, 30, (count, 4)).astype(np.float32)
    boxes[:, 0] = np.arange(count)
    return rng.choice(np.array(ids, np.int64), count), boxes


@pytest.mark.parametrize("most", [1, 3, 50, 1000])
def test_each_image_has_its_own_best_first(most):
    image_ids, boxes = proposals()
    data = WithProposals(Pictures(), image_ids, boxes, most)
    for n, key in enumerate(IDS):
        expected = [box for other, box in zip(image_ids, boxes, strict=True) if other == key][:most]
        own = data[n].proposals
        assert np.array_equal(own, np.array(expected, np.float32).reshape(-1, 4)) and own.dtype == np.float32
        assert (key == 7) == (len(own) == 0)


def test_all_else_is_the_data_sets():
    plain, data = Pictures(), WithProposals(Pictures(), *proposals(), 20)
    for name in DetectionDataset.__annotations__:
        assert getattr(data, name) is getattr(plain, name), name
    assert len(data) == len(plain) and data.coco() == plain.coco() and data.repairs == {}
    for n in range(len(IDS)):
        for field in fields(Sample):
            if field.name != "proposals":
                assert np.array_equal(getattr(data[n], field.name), getattr(plain[n], field.name)), field.name


def test_a_coco_set_keeps_its_repairs(tmp_path):
    contents = base()
    contents["annotations"][2]["bbox"] = [1, 2, 0, 4]
    plain = CocoDataset(*write(tmp_path, contents), "ants", invalid="drop", keep_empty=False)
    data = WithProposals(plain, np.array([7, 7]), np.array([[0, 0, 9, 9], [1, 1, 5, 5]]), 1)
    assert data.repairs == plain.repairs == {"boxes dropped": 1, "images without objects left out": 1}
    assert [data[n].proposals.tolist() for n in range(2)] == [[] if key == 42 else [[0, 0, 9, 9]] for key in data.image_ids]


def test_proposals_of_other_data_are_refused():
    image_ids, boxes = proposals()
    image_ids[[5, 6, 50]] = [77, 8, 77]
    with pytest.raises(UserError, match=r"2 images that pictures does not have, the first with image id 8\b"):
        WithProposals(Pictures(), image_ids, boxes, 20)


def test_no_proposals_at_all():
    data = WithProposals(Pictures(), np.zeros(0, np.int64), np.zeros((0, 4), np.float32), 20)
    assert all(data[n].proposals.shape == (0, 4) for n in range(len(IDS)))


def test_what_is_handed_out_is_a_copy():
    data = WithProposals(Pictures(), *proposals(), 20)
    before = data[0].proposals.copy()
    data[0].proposals.fill(0)
    assert before.any() and np.array_equal(data[0].proposals, before)


def test_what_is_not_handed_out_is_not_sent_to_the_workers():
    image_ids, boxes = proposals(count=100_000)
    data = WithProposals(Pictures(), image_ids, boxes, 10)
    sent = pickle.dumps(data)
    assert len(sent) < 4_000
    assert all(np.array_equal(data[n].proposals, pickle.loads(sent)[n].proposals) for n in range(len(IDS)))


def loaded(data, workers=0):
    how = {"resize": Resize(50, 999), "batch_size": 2, "workers": workers}
    return [
        *training_batches(data, steps=range(4), seed=0, flip=True, **how),
        *evaluation_batches(data, count=None, **how),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_the_proposals_of_their_images(workers):
    """Proposals that are the boxes arrive as the boxes, through every resize and flip, and with workers as without."""
    plain, boxes = Pictures(), np.concatenate([Pictures()[n].boxes for n in range(len(IDS))])
    batches = loaded(WithProposals(plain, np.array(IDS), boxes, 20), workers)
    for batch, alone in zip(batches, loaded(plain), strict=True):
        assert alone.proposals is None
        assert torch.equal(batch.images, alone.images) and torch.equal(batch.boxes, alone.boxes)
        assert torch.equal(batch.proposals, alone.boxes) and torch.equal(batch.proposals_valid, alone.valid)
