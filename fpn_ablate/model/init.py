"""Draw initial weights, each parameter from a generator of its own."""

from torch import nn

from fpn_ablate.model.necks.upsample import Deconvolution
from fpn_ablate.utils.seeding import torch_generator


def initialise(model: nn.Module, seed: int) -> None:
    """Draw every parameter from a generator keyed by its name: rows share the weights that agree in name and shape.

    Detectron's defaults (not in the paper): Xavier with bias 0 in the neck and the fully connected layers, Gaussian 0.01 in the
    RPN and for class scores, 0.001 for the box deltas of the second stage; He in a backbone, to which conv5 as a head belongs.
    """
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{owner}.{name}"
            generator = torch_generator(seed, "init", full_name)
            if parameter.dim() < 2:  # a bias, or the scale of a norm or of a layer
                nn.init.constant_(parameter, float(not name.endswith("bias")))
            elif full_name.startswith("rpn."):
                nn.init.normal_(parameter, std=0.01, generator=generator)
            elif full_name.startswith("roi.predictor."):
                nn.init.normal_(parameter, std=0.001 if "deltas" in full_name else 0.01, generator=generator)
            elif full_name.startswith(("backbone.", "roi.box_head.stage.")) and isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(parameter, mode="fan_out", generator=generator)
            elif isinstance(module, Deconvolution):
                # Each output pixel of a 4x4 stride-2 kernel sees 4 of its 16 taps.
                bound = (6 / (4 * (module.in_channels + module.out_channels))) ** 0.5
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
            else:
                nn.init.xavier_uniform_(parameter, generator=generator)
