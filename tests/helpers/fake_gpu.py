"""Build each row and task on fake tensors of `cuda`, and check devices and dtypes up to the losses. Run as a script.

In a process of its own: torch keeps a device guard of the fake GPU, after which no process can be forked that trains.
"""

from collections.abc import Iterable
from unittest.mock import patch

import torch
from settings import JOINT, ROWS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fpn_ablate.config.composition import compose
from fpn_ablate.config.schema import Config
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.optimise import optimise
from fpn_ablate.structures.instances import Proposals, Targets

FP32 = {(torch.float32, "cuda")}


def facts(tensors: Iterable[Tensor]) -> set[tuple[torch.dtype, str]]:
    return {(x.dtype, x.device.type) for x in tensors}


def check(cfg: Config, is_fast: bool) -> None:
    """No tensor is on another device, and bf16 ends at the heads. Operators whose sizes depend on values are left out."""
    model = build_detector(cfg, num_classes=3).train()
    model = optimise(model, torch.device("cuda")) if is_fast else model
    images, boxes = torch.empty(2, 3, 64, 96, dtype=torch.uint8), torch.empty(2, 3, 4)
    valid = torch.ones(2, 3, dtype=torch.bool)
    targets = Targets(boxes, valid.long(), valid, ~valid, torch.empty(2, 2, dtype=torch.int64))
    proposals = Proposals(torch.empty(2, 30, 4), torch.empty(2, 30), torch.ones(2, 30, dtype=torch.bool))
    generator = torch.Generator("cpu")  # there is no other here
    with torch.autocast("cuda", torch.bfloat16):
        features = model.features(images, targets.sizes)
        assert {device for _, device in facts(features.values())} == {"cuda"}
        assert not is_fast or facts(features.values()) == {(torch.bfloat16, "cuda")}  # a plain frozen batch norm is fp32
        if model.rpn:
            objectness, deltas, anchors = model.rpn(features)
            assert facts([*objectness, *deltas, *anchors]) == FP32
            assert facts(model.rpn.losses(features, targets, generator).values()) == FP32
        if model.roi:
            rois, labels, matched_idxs, sampled_mask = model.roi.sample(proposals, targets, generator)
            size = len(rois.flatten(0, 1)), model.roi.pooler.in_channels, *[model.roi.pooler.resolution] * 2
            with patch.object(type(model.roi.pooler), "pool", lambda *_: torch.empty(size)):
                scores, deltas = model.roi(features, rois)
            losses = model.roi.losses_of(scores, deltas, rois, labels, matched_idxs, sampled_mask, boxes)
            assert facts([scores, deltas, *losses.values()]) == FP32


if __name__ == "__main__":
    # A joint network has both stages, so that of the others the pyramid is enough.
    cells = [
        ("fpn", (), True),
        ("fpn", ("task=fast_rcnn",), True),
        ("fpn", JOINT, False),
        *((row, JOINT, True) for row in ROWS),
    ]
    configurations = [compose(("recipe=smoke", f"ablation={row}", *task)) for row, task, _ in cells]
    # torch asks whether there is a GPU before it lets autocast run.
    no_amp, has_bf16 = "torch.cuda.amp.common.amp_definitely_not_available", "torch.cuda.is_bf16_supported"
    with patch(no_amp, lambda: False), patch(has_bf16, lambda *_: True), FakeTensorMode(), torch.device("cuda"):
        for cell, cfg in zip(cells, configurations, strict=True):
            print(*cell, flush=True)
            check(cfg, cell[-1])
