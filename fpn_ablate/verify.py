"""What a row is, seen before it is trained: anchors, reach of the switches, parameters, cost."""

from dataclasses import asdict, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from fpn_ablate.model.build import PAPER_SHORT_SIDE, build_detector, initialise
from fpn_ablate.model.detector import Detector
from fpn_ablate.schema import Config, FPNNeck

PAPER_SIZE = (800, 1000)  # height and width at which the paper's "# anchors" come out exactly


@dataclass(frozen=True)
class RowFacts:
    """`anchors` and `gflops` (2 per multiply-add) are for one image of 800 x 1000; `reach`: the backbone maps that the finest
    level depends on; `params` counts what is built, `trained` what is not frozen."""

    feature: str
    anchors: int
    lateral: bool
    top_down: bool
    reach: list[str]
    params: int
    trained: int
    gflops: float

    def to_dict(self) -> dict:
        return asdict(self)


def row_facts(cfg: Config) -> RowFacts:
    """Build the row once without memory (shapes only) for its cost, once small for its gradients."""
    with torch.device("meta"):
        model = build_detector(cfg, PAPER_SHORT_SIDE).eval()
        images = torch.empty(1, 3, *PAPER_SIZE)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            _, _, anchors = model.rpn(model.neck(model.backbone(images)))
    is_fpn = isinstance(cfg.neck, FPNNeck)
    return RowFacts(
        feature=_feature(cfg),
        anchors=sum(len(a) for a in anchors),
        lateral=is_fpn and cfg.neck.lateral,
        top_down=is_fpn and cfg.neck.top_down,
        reach=finest_level_reach(cfg),
        params=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        gflops=round(counter.get_total_flops() / 1e9, 2),
    )


def _feature(cfg: Config) -> str:
    """The paper's name of what the heads read: {Pk}, P2, C4."""
    if isinstance(cfg.neck, FPNNeck):
        return "{Pk}" if cfg.neck.output == "pyramid" else cfg.neck.output.upper()
    return cfg.neck.level.upper()


def finest_level_reach(cfg: Config) -> list[str]:
    """Which of c2..c5 have a gradient from the neck's finest output."""
    model: Detector = build_detector(cfg, 64)
    initialise(model, seed=0)
    features = {
        level.name: torch.ones(1, level.channels, 64 // level.stride, 64 // level.stride, requires_grad=True)
        for level in model.backbone.levels
    }
    finest = next(iter(model.neck(features).values()))
    finest.square().sum().backward()
    return [name for name, x in features.items() if x.grad is not None and bool(x.grad.abs().sum() > 0)]
