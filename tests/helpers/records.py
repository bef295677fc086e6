"""Records as a run would leave them, without a run."""

import random
from typing import Any

FACTS = {
    "c4": ("C4", 47250, False, False),
    "c5": ("C5", 12000, False, False),
    "fpn": ("{Pk}", 199974, True, True),
    "bottom_up": ("{Pk}", 199974, True, False),
    "no_lateral": ("{Pk}", 199974, False, True),
    "finest": ("P2", 750000, True, True),
}
METRICS = ("AR100", "AR1k", "AR1k_s", "AR1k_m", "AR1k_l")


def make_record(row: str = "fpn", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A finished record; `changes` replace its keys, and `metrics` and `config` are merged into what is there."""
    feature, anchors, lateral, top_down = FACTS.get(row, FACTS["fpn"])
    draw = random.Random(f"{row} {seed}")
    record = {
        "format": 1,
        "status": "finished",
        "error": None,
        "fingerprint": f"{random.Random(f'{row}/{seed}').getrandbits(64):016x}",
        "setting": "5e77" * 4,
        "table": "table1_rpn",
        "recipe": "quick",
        "data": "shapes",
        "generated": True,
        "task": "rpn",
        "row": row,
        "seed": seed,
        "config": {"neck": {"lateral": lateral, "top_down": top_down}, "seed": seed, "recipe": {"steps": 500}},
        "verify": {"feature": feature, "anchors": anchors, "lateral": lateral, "top_down": top_down, "gflops": 1.5},
        "metrics": {name: draw.uniform(0.1, 0.7) for name in METRICS},
        "objects": {"small": 11, "medium": 12, "large": 13},
        "images": {"count": 400, "digest": "1a2b3c4d5e6f7a8b"},
        "cost": {"pretrain_s": 120.0, "train_s": 70.0, "eval_s": 9.0, "steps": 500},
        "environment": {"device": "cpu", "evaluator": "faster-coco-eval 1.8.0", "commit": "abc1234", "dirty": False,
                        "version": "0.1.0"},
        "started": "2026-11-21T08:00:00+00:00",
        "finished": f"2026-11-21T09:0{seed % 10}:00+00:00",
    }  # fmt: skip
    for key in ("metrics", "config"):
        record[key] |= changes.pop(key, {})
    record |= changes
    if record["status"] != "finished":
        record["metrics"] = {}
    return record
