"""A folder for --config-dir with a part of each kind: a PANet-like neck, a backbone of five convolutions, a head of each stage.

`ablation=pan`, `five`, `fourconv` and `twoconv` have one of them, `ablation=everything` all.
"""

FILES = {
    "necks.py": """
        import torch.nn.functional as F
        from torch import nn

        from fpn_ablate.model.necks.base import Neck
        from fpn_ablate.structures.levels import Level


        class PathAggregation(Neck):
            has_lateral = has_top_down = True

            def __init__(self, in_levels, *, channels: int, ceil: bool = True):
                super().__init__()
                names = [level.name.replace("c", "p") for level in in_levels]
                self.ceil = ceil
                self.levels = tuple(Level(name, channels) for name in [*names, "p6"])
                self.lateral = nn.ModuleList(nn.Conv2d(level.channels, channels, 1) for level in in_levels)
                self.down = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in names[1:])

            def forward(self, features):
                maps = [conv(x) for conv, x in zip(self.lateral, features.values(), strict=True)]
                for i in (2, 1, 0):
                    maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[-2:])
                for i in (0, 1, 2):
                    maps[i + 1] = maps[i + 1] + self.down[i](maps[i])
                maps.append(F.max_pool2d(maps[-1], 2, ceil_mode=self.ceil))
                return {level.name: x for level, x in zip(self.levels, maps, strict=True)}
    """,
    "backbones.py": """
        from torch import nn

        from fpn_ablate.model.backbones.base import STAGES, Backbone


        class FiveConvolutions(Backbone):
            def __init__(self, *, width: int = 4):
                widths = [width, width, 2 * width, 4 * width, 8 * width]
                convs = [nn.Conv2d(before, after, 3, 2, 1) for before, after in zip([3, *widths], widths)]
                layers = [nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()) for conv in convs]
                super().__init__(dict(zip(STAGES, layers)), tuple(widths[1:]))
    """,
    "heads.py": """
        from torch import nn

        from fpn_ablate.model.heads.box_head import BoxHead
        from fpn_ablate.model.heads.rpn import RPNHead


        class FourConvolutions(BoxHead):
            label = "4conv"

            def __init__(self, in_channels, resolution, *, width: int):
                super().__init__()
                convs = [nn.Conv2d(before, width, 3, padding=1) for before in (in_channels, width, width, width)]
                self.layers = nn.Sequential(*[layer for conv in convs for layer in (conv, nn.ReLU())])
                self.out_channels = width

            def forward(self, x):
                return self.layers(x).mean((2, 3))


        class TwoConvolutions(nn.Module):
            def __init__(self, channels, num_anchors, *, width: int = 8):
                super().__init__()
                self.first, self.head = nn.Conv2d(channels, width, 3, padding=1), RPNHead(width, num_anchors)

            def forward(self, features):
                return self.head({name: self.first(x).relu() for name, x in features.items()})
    """,
    "neck/pan.yaml": "class: necks.PathAggregation\nchannels: ${recipe.channels}\n",
    "backbone/five.yaml": "class: backbones.FiveConvolutions\nweights: pretrain\nfreeze_at: 2\nfrozen_bn: true\n",
    "ablation/pan.yaml": "# @package _global_\ndefaults: [{override /neck: pan}]\n",
    "ablation/five.yaml": "# @package _global_\ndefaults: [{override /backbone: five}]\n",
    "ablation/everything.yaml": """
        # @package _global_
        defaults: [{override /neck: pan}, {override /backbone: five}]
        rpn: {head: {class: heads.TwoConvolutions}}
        task: {roi: {head: {class: heads.FourConvolutions, width: 8}}}
    """,
    "ablation/twoconv.yaml": "# @package _global_\nrpn: {head: {class: heads.TwoConvolutions}}\n",
    "ablation/fourconv.yaml": "# @package _global_\ntask: {roi: {head: {class: heads.FourConvolutions, width: 8}}}\n",
}
