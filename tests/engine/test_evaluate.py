"""Proposals come back in native pixels, for every declared image, from a model in evaluation mode."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fpn_ablate.engine.evaluate import ground_truth, predict, propose
from fpn_ablate.structures.batch import Sample
from fpn_ablate.structures.instances import BatchDetections, Proposals
from fpn_ablate.utils import rle

CPU = torch.device("cpu")
SIZES = [(64, 64), (130, 65), (40, 200), (64, 96), (77, 91)]


class Pictures:
    """Images of several sizes with ids that are not their index; the second has no object."""

    def __len__(self):
        return len(SIZES)

    def __getitem__(self, index):
        boxes = np.zeros((0 if index == 1 else 1, 4), np.float32)
        image = np.full((*SIZES[index], 3), 10 * index, np.uint8)
        return Sample(image, boxes, np.ones(len(boxes), np.int64), np.zeros(len(boxes), bool), 50 - index)

    def coco(self):
        images = [{"id": 50 - i, "height": h, "width": w} for i, (h, w) in enumerate(SIZES)]
        annotations = [{"id": i + 1, "image_id": 50 - i, "bbox": [0, 0, 9, 9]} for i in range(len(SIZES)) if i != 1]
        return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}


class WholeImage(nn.Module):
    """Proposes the whole of each image, then its left upper quarter, then padding; nothing on the image of id 48."""

    def __init__(self):
        super().__init__()
        self.modes = []

    def propose(self, images, sizes, to_train=False):
        self.modes.append(self.training)
        size = sizes.flip(1).float()
        zero = torch.zeros_like(size)
        boxes = torch.stack([torch.cat([zero, size], 1), torch.cat([zero, size / 2], 1), torch.cat([zero, size * 9], 1)], 1)
        valid = torch.tensor([True, True, False]).repeat(len(images), 1)
        valid[(images[:, 0, 0, 0] == 20)] = False
        return Proposals(boxes, torch.tensor([0.9, 0.8, 0.0]).repeat(len(images), 1), valid)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_boxes_are_in_pixels_of_the_native_image(config, batch_size):
    model = WholeImage().train()
    proposals = propose(model, Pictures(), config(f"recipe.eval_batch_size={batch_size}").recipe, CPU)
    assert not any(model.modes)
    expected = [i for i in range(len(SIZES)) if i != 2]
    assert proposals.image_ids.tolist() == [50 - i for i in expected for _ in range(2)]
    for index, boxes in zip(expected, proposals.boxes.reshape(-1, 2, 4), strict=True):
        height, width = SIZES[index]
        np.testing.assert_allclose(boxes, [[0, 0, width, height], [0, 0, width / 2, height / 2]], rtol=1e-5)
    assert proposals.scores.tolist() == pytest.approx([0.9, 0.8] * 4)


@pytest.mark.parametrize("labelled", [False, True])
def test_masks_are_pasted_into_native_images(config, labelled):
    """Each box's mask has its upper half: the upper half of the image, then that of its left upper quarter."""
    half = (torch.arange(8) < 4).float()[:, None].expand(8, 8)

    def predictor(batch):
        proposals = WholeImage().propose(batch.images, batch.sizes)
        masks = half.expand(*proposals.scores.shape, 8, 8)
        if not labelled:
            return replace(proposals, masks=masks)
        labels = torch.ones_like(proposals.scores, dtype=torch.int64)
        return BatchDetections(proposals.boxes, proposals.scores, labels, proposals.valid, masks)

    predictions = predict(predictor, Pictures(), config("recipe.eval_batch_size=2").recipe, CPU)
    assert (predictions.labels is not None) == labelled
    for n, (image_id, mask) in enumerate(zip(predictions.image_ids.tolist(), predictions.masks, strict=True)):
        height, width = SIZES[50 - image_id]
        bitmap = rle.decode([mask], (height, width))[0]
        scale = 1 + n % 2  # of the whole image, of its quarter
        expected = np.zeros((height, width), bool)
        expected[: height // 2 // scale, : width // scale] = True
        assert (bitmap != expected).mean() < 0.05 and bitmap.any()


def test_proposals_and_truth_are_of_the_same_images(config):
    for count, number in ((2, 2), (99, 5), (None, 5)):
        truth = ground_truth(Pictures(), count)
        ids = [image["id"] for image in truth["images"]]
        assert ids == [50 - i for i in range(number)]
        assert {a["image_id"] for a in truth["annotations"]} == set(ids) - {49}
        proposals = propose(WholeImage(), Pictures(), config().recipe, CPU, count=count)
        assert set(proposals.image_ids.tolist()) == set(ids) - {48}
