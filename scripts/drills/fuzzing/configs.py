"""Bad configurations and command lines."""

import copy
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fpn_ablate.utils.errors import UserError
from fuzzing.checks import check_equal, check_message, run_command
from fuzzing.draw import NUMBERS, TEXTS, Draw, mutate_tree, nesting_depth, paths, value_at
from fuzzing.valid_set import valid_annotations, write_pictures

BASES = [
    ("recipe=smoke",),
    ("recipe=smoke", "task=fast_rcnn"),
    ("recipe=smoke", "task=faster_rcnn", "backbone=resnet18", "backbone.weights=imagenet"),
    ("recipe=smoke", "data=coco", "data.root=nowhere"),
    ("recipe=smoke", "neck=single_level", "backbone=mobilenet_v2"),
    ("recipe=smoke", "neck=hierarchy", "rpn.shared=false"),
    ("recipe=paper2017", "task=faster_rcnn", "task.training=joint"),
]
EXTREMES = [
    *(1, 2, 7, 31, 32, 1000, 4096, 8192, 65_536, 10**6, 10**9, 10**18),
    *(1e-30, 1e-6, 1e-3, 0.5, 0.999, 1.0, 1e3, 1e6, 1e30, 1e300),
]


def configuration(changes: dict[str, Any] | None = None, *overrides: str) -> Any:
    """Compose a configuration and replace groups of it."""
    from fpn_ablate.config.validation import validate

    return validate({**composed(overrides or ("recipe=smoke",)), **(changes or {})})


_COMPOSED: dict[tuple[str, ...], dict[str, Any]] = {}


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose a configuration as values, once for each list of overrides."""
    from fpn_ablate.config.composition import compose

    key = tuple(overrides)
    if key not in _COMPOSED:
        _COMPOSED[key] = compose(key).model_dump(mode="json")
    return copy.deepcopy(_COMPOSED[key])


class Configs:
    """Try a configuration: it is refused with a message, or reads back equal, and its network can be built."""

    how = (
        "mutated configurations of six tasks, as values and as config.yaml of a run; accepted ones are built on the meta device"
    )

    def __init__(self, folder: Path) -> None:
        self.file = folder / "config.yaml"

    def case(self, draw: Draw) -> str:
        from fpn_ablate.config.validation import load_saved_config, validate

        values = composed(draw.choice(BASES))
        if draw.random() < 0.4:  # numbers alone, mostly of the right type
            for path in draw.sample(
                [p for p in paths(values) if type(value_at(values, p)) in (int, float)], draw.choice([1, 2, 4])
            ):
                value_at(values, path[:-1])[path[-1]] = draw.choice(EXTREMES)
        else:
            values = mutate_tree(draw, values)
        before = repr(values)[:300]
        try:
            if draw.random() < 0.3 and nesting_depth(values) < 100:
                self.file.write_bytes(yaml.safe_dump(values).encode("utf-8", "surrogatepass"))
                cfg = load_saved_config(self.file)
            else:
                cfg = validate(values)
        except UserError as error:
            check_message(str(error))
            return "refused"
        dumped = cfg.model_dump(mode="json")
        json.dumps(dumped, allow_nan=False)
        check_equal(validate(dumped) == cfg, True, f"equal when read back: {before}")
        self._build(cfg)
        return "accepted"

    def _build(self, cfg: Any) -> None:
        import torch

        from fpn_ablate.engine.inputs import world
        from fpn_ablate.engine.optim import base_learning_rate
        from fpn_ablate.model.build import build_detector

        check_equal(math.isfinite(base_learning_rate(cfg.recipe.optimizer, cfg.recipe.batch_size)), True, "a learning rate")
        world(cfg.data, cfg.recipe.short_side)
        with torch.device("meta"):
            model = build_detector(cfg, num_classes=3)
        gibibytes = sum(p.numel() for p in model.parameters()) * 4 / 2**30
        check_equal(gibibytes < 64, True, f"parameters of {gibibytes:.0f} GiB")


TOKENS = [
    *("=", "", "a=b=c", "~neck", "~x", "+x=1", "++recipe.steps=1", "neck@head=fpn", "data=coco,shapes"),
    *("ablation=c4", "ablation="),
    *("ablation=../x", "ablation=fpn,c4", "recipe=", "recipe=paper2017", "recipe=../../x", "task=joint"),
    *("backbone=timm/x", "[", "'"),
    *("experiments=table1", "+experiments=table1,table2", "experiments=../x", "hydra.run.dir=x",),
    *("hydra/launcher=joblib", "task={"),
    *("--limit", "--limit=x", "--limit=-1", "--json", "--json=-", "--json=.", "--size=0x0", "--markdown", "-m",),
    *("--help", "--nope"),
    *("seed=1,2", "seed=range(1,3)", "seed=choice(1)", "seed=1_000", "seed=0x10",),
    *("data.root=${oc.env:HOME}", "data.root=${nope}"),
    *("data.root=${data.root}", "data.root=???", "recipe=null", "recipe.optimizer=null", "neck={}", "task=null",),
    *("data=null", "seed=~"),
    *("recipe.schedule.drops=[0.5", "recipe.schedule.drops=[]", "rpn.anchor_sizes={a:1}", "factors=neck",),
    *("factors=[]", "data.label="),
]  # fmt: skip


class Commands:
    """Try a command line of the doctor: it ends with exit code 0, 1 or 2 and a message."""

    how = "command lines of keys that exist and that do not with values of any type, through the doctor's command"

    def __init__(self, folder: Path) -> None:
        from fpn_ablate.config.validation import keys

        write_pictures(folder)
        (folder / "instances.json").write_text(json.dumps(valid_annotations()))
        split = [f"data.{split}.{key}" for split in ("train", "val") for key in ("annotations", "images")]
        self.base = ["recipe=smoke", "data=coco", f"data.root={folder}", f"{split[0]}=instances.json", f"{split[1]}=images",
                     f"{split[2]}=instances.json", f"{split[3]}=images", "ablation=fpn"]  # fmt: skip
        self.keys, self.folder = sorted({*keys()}), folder

    def case(self, draw: Draw) -> str:
        from fpn_ablate.cli.main import main as entry

        # Arguments of a process cannot hold the characters that are removed.
        arguments = [
            token.translate({0: "", 0xD800: ""}) for token in (self._token(draw) for _ in range(draw.choice([1, 1, 2, 3])))
        ]
        previous = Path.cwd()
        os.chdir(self.folder)
        try:
            code, text = run_command(lambda: entry(["doctor", *self.base, *arguments]))
        finally:
            os.chdir(previous)
        check_message(text)
        check_equal(code in (0, 1, 2), True, f"exit code {code} of {arguments}")
        return {0: "sound", 1: "refused", 2: "refused"}[code]

    def _token(self, draw: Draw) -> str:
        if draw.random() < 0.4:
            return draw.choice(TOKENS)
        key = draw.choice(self.keys) if draw.random() < 0.9 else draw.choice(TEXTS)
        value = draw.choice(
            [str(draw.choice(EXTREMES)), str(draw.choice(NUMBERS[:-1])), draw.choice(TEXTS), "[1,2]", "{a: 1}", "null"]
        )
        return draw.choice(["", "", "", "+", "++", "~"]) + f"{key}={value}"
