"""The same pictures, and random weights, for a detector of torchvision and for ours."""

import numpy as np
import torch
from torch import nn

from fpn_ablate.data.transforms import Resize, collate, prepare, to_native
from fpn_ablate.structures.batch import Sample
from fpn_ablate.utils import rle

CLASSES = 7
LAST_NORM = {"resnet18": "bn2", "resnet50": "bn3"}  # of a block


def randomise(model, last_norm, last_layers):
    """Draw weights that make scores of every size, so that nothing ties, with activations that neither vanish nor grow."""
    generator = torch.Generator().manual_seed(0)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if "running_mean" in name or name.endswith("bias"):
            nn.init.normal_(value, std=0.05, generator=generator)
        elif "running_var" in name:
            nn.init.uniform_(value, 0.5, 1.5, generator=generator)
        elif value.dim() == 1:
            nn.init.uniform_(value, 0.1, 0.3, generator=generator) if last_norm in name else nn.init.uniform_(
                value, generator=generator
            )
        else:
            last = any(word in name for word in last_layers)
            nn.init.normal_(value, std=(0.5 if last else 1.4) * value[0].numel() ** -0.5, generator=generator)


def pictures(*sizes, classes=CLASSES):
    """Smooth pictures (height, width) with objects, none of them a crowd: discs in their boxes."""
    generator = np.random.default_rng(0)
    for number, (height, width) in enumerate(sizes):
        coarse = torch.from_numpy(generator.random((1, 3, height // 9, width // 9)))
        image = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].clamp(0, 1)
        corner = generator.random((5, 2)) * [width * 0.6, height * 0.6]
        side = (0.06 + 0.3 * generator.random((5, 2))) * [width, height]
        boxes = np.concatenate([corner, corner + side], 1).astype(np.float32)
        labels = generator.integers(1, classes + 1, 5)
        pixels = (image * 255).byte().permute(1, 2, 0).numpy()
        y, x = np.ogrid[:height, :width]
        middle, half = (corner + side / 2)[..., None, None], side[..., None, None] / 2
        discs = ((x - middle[:, 0]) / half[:, 0]) ** 2 + ((y - middle[:, 1]) / half[:, 1]) ** 2 <= 1
        yield Sample(pixels, boxes, labels, np.zeros(5, bool), number, masks=rle.encode(discs))


def batch_of(samples, cfg):
    resize = Resize.of(cfg.recipe)
    batch = collate([prepare(sample, resize, flip=False) for sample in samples])
    batch.boxes = batch.boxes.to(torch.get_default_dtype())
    return batch


def their_input(samples):
    images = [torch.from_numpy(s.image).permute(2, 0, 1) / 255 for s in samples]
    masks = [torch.from_numpy(rle.decode(s.masks, s.image.shape[:2])).byte() for s in samples]
    return images, [
        {"boxes": torch.from_numpy(s.boxes), "labels": torch.from_numpy(s.labels), "masks": mask}
        for s, mask in zip(samples, masks, strict=True)
    ]


def close(ours, theirs, tolerance):
    """Equal to `tolerance` of the largest value."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, float(theirs.detach().abs().max())))


@torch.no_grad()
def same_detections(theirs, ours, samples, batch, most):
    """Check the detections of a detector of one stage, of which theirs returns at most `most` an image."""
    detections = ours.detect(batch.images, batch.sizes)
    for n, (sample, expected) in enumerate(zip(samples, theirs(their_input(samples)[0]), strict=True)):
        solid = (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(1)  # theirs keeps boxes that clipping has emptied
        labels, scores, boxes = (expected[key][solid] for key in ("labels", "scores", "boxes"))
        assert len(labels) > 20 and (detections.valid[n].sum() == len(labels) or len(solid) == most)
        first = slice(len(labels))
        assert detections.labels[n][first].tolist() == labels.tolist()
        close(detections.scores[n][first], scores, 1e-5)
        close(to_native(detections.boxes[n][first], batch.sizes[n].tolist(), sample.image.shape[:2]), boxes, 1e-5)
