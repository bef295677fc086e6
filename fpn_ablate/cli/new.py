"""Write a part of the user's to begin with: `python -m fpn_ablate new neck mypan mine/`."""

import keyword
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fpn_ablate.cli.parser import command_parser
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text
from fpn_ablate.utils.paths import CONF

ABOUT = """Write a class, its YAML, a row and a test of its contract into a folder of your own. The row runs at once; change the
class from there. head: the RPN's."""

NECK = '''
    """A neck of one's own, which starts as the paper's FPN: laterals, top-down, outputs."""

    import torch.nn.functional as F
    from torch import nn

    from fpn_ablate.model.necks.base import Neck
    from fpn_ablate.structures.levels import Level


    class {cls}(Neck):
        """Map C2..C5 to P2..P6. Keyword arguments are keys of neck/{name}.yaml, and their annotations the keys' types."""

        has_lateral = has_top_down = True  # marks in the tables

        def __init__(self, in_levels, *, channels: int, upsample: str = "nearest") -> None:
            super().__init__()
            self.upsample = upsample
            names = [level.name.replace("c", "p") for level in in_levels]
            self.levels = tuple(Level(name, channels) for name in [*names, "p6"])  # finest first; p3 has stride 2^3
            self.lateral = nn.ModuleList(nn.Conv2d(level.channels, channels, 1) for level in in_levels)
            self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_levels)

        def forward(self, features):
            """Map {{"c2": (N, C, H2, W2), ...}} to {{"p2": (N, channels, H2, W2), ...}}."""
            maps = [conv(x) for conv, x in zip(self.lateral, features.values(), strict=True)]
            for fine in range(len(maps) - 2, -1, -1):  # coarse to fine
                size = maps[fine].shape[-2:]
                maps[fine] = maps[fine] + F.interpolate(maps[fine + 1], size=size, mode=self.upsample)
            maps = [conv(x) for conv, x in zip(self.smooth, maps, strict=True)]
            maps.append(maps[-1][..., ::2, ::2])  # P6
            return {{level.name: x for level, x in zip(self.levels, maps, strict=True)}}
'''
BACKBONE = '''
    """A backbone of one's own: stem and four stages, each of half the resolution."""

    from torch import nn

    from fpn_ablate.model.backbones.base import STAGES, Backbone


    class {cls}(Backbone):
        """Keyword arguments are keys of backbone/{name}.yaml, and their annotations the keys' types."""

        def __init__(self, *, width: int = 16) -> None:
            widths = [width, width, 2 * width, 4 * width, 8 * width]  # of the stem and C2..C5
            layers = []
            for before, after in zip([3, *widths], widths):  # strides 2, 4, 8, 16, 32
                convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
                layers.append(nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU()))
            super().__init__(dict(zip(STAGES, layers, strict=True)), tuple(widths[1:]))
'''
HEAD = '''
    """A head of one's own for the RPN: two 3x3 convolutions in place of one."""

    from torch import nn

    from fpn_ablate.model.heads.rpn import RPNHead


    class {cls}(nn.Module):
        """Keyword arguments are keys of rpn.head in ablation/{name}.yaml, and their annotations the keys' types."""

        def __init__(self, channels, num_anchors, *, width: int = 64) -> None:
            super().__init__()
            self.first = nn.Conv2d(channels, width, 3, padding=1)
            self.rest = RPNHead(width, num_anchors)

        def forward(self, features):
            """Return objectness (N, Ri) and deltas (N, Ri, 4) of each level."""
            return self.rest({{name: self.first(x).relu() for name, x in features.items()}})
'''
TEST = '''
    """The contract of {name}: levels, strides, sizes of maps, a gradient for every parameter."""

    from pathlib import Path

    from fpn_ablate.config.composition import compose
    from fpn_ablate.model import build


    def test_the_part_keeps_its_contract():
        build.check(compose(["recipe=smoke", "ablation={name}"], Path(__file__).parent))
'''
# By kind: the class, the group whose file names it, that file, the row, and the factors that the row needs beside others.
KINDS = {
    "neck": (
        NECK,
        "neck",
        "class: {name}.{cls}\nchannels: ${{recipe.channels}}\n",
        "defaults: [{{override /neck: {name}}}]\n",
        "",
    ),
    "backbone": (
        BACKBONE,
        "backbone",
        "class: {name}.{cls}\nweights: none   # or pretrain, or a file\nfreeze_at: 0\nfrozen_bn: false\n",
        "defaults: [{{override /backbone: {name}}}]\n",
        "'factors=[neck,backbone]'",
    ),
    "head": (HEAD, "", "", "rpn: {{head: {{class: {name}.{cls}}}}}\n", "'factors=[neck,rpn.head]'"),
}


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """Write the files and print how to run them.

    Raises:
        UserError: the name is not one, is taken, or a file is there already.
    """
    parser = command_parser("new", ABOUT)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("name", help="name of the row and its files, as my_pan; its class is then MyPan")
    parser.add_argument("folder", type=Path, help="for --config-dir; it is made if it is not there")
    options = parser.parse_args(arguments)
    name, folder, (code, group, part, row, factors) = options.name, options.folder, KINDS[options.kind]
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(f"{name}: give a name of small letters, digits and _, as my_{options.kind}")
    for ours in (CONF / "ablation" / f"{name}.yaml", CONF / (group or "ablation") / f"{name}.yaml"):
        if ours.exists():
            raise UserError(f"{name}: there is a built-in {ours.parent.name}={name}; give another name")
    words = {"name": name, "cls": "".join(part.capitalize() for part in name.split("_"))}
    files = {f"{name}.py": textwrap.dedent(code.format(**words)).lstrip("\n")}
    files |= {f"{group}/{name}.yaml": part.format(**words)} if group else {}
    files[f"ablation/{name}.yaml"] = f"# @package _global_\n# a {options.kind} of one's own\n{row.format(**words)}"
    files[f"{name}_test.py"] = textwrap.dedent(TEST.format(**words)).lstrip("\n")
    if taken := [str(folder / file) for file in files if (folder / file).exists()]:
        raise UserError(f"nothing written: {', '.join(taken)} would be overwritten; give another name or folder")
    for file, text in files.items():
        save_text(folder / file, text)
        print(f"written: {folder / file}")
    start = f"python -m fpn_ablate --config-dir {folder}"
    beside = f"{start} -m ablation=fpn,{name} {factors}".rstrip()
    print(f"\nrun it in seconds: {start} ablation={name} recipe=smoke")
    print(f"what it is:        {start} verify ablation={name}")
    print(f"beside fpn:        {beside}")
    print(f"test it:           python -m pytest -o addopts= {folder / f'{name}_test.py'}   (pip install pytest)")
    return 0
