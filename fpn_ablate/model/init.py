"""Draw initial weights, each parameter from a generator of its own."""

from collections.abc import Iterator

from torch import nn

from fpn_ablate.utils.seeding import torch_generator


def initialise(model: nn.Module, seed: int) -> None:
    """Draw every parameter from a generator keyed by its name: rows share the weights that agree in name and shape.

    A module may draw the parameters in it: its `init_parameter(layer, parameter, generator) -> bool` draws one of a layer's, or
    returns False to leave it to the next module outwards. By default scales are 1, biases 0, and weights Xavier's (Detectron's
    choice; the paper states none).
    """
    for path, parameter in model.named_parameters():
        *owners, name = path.split(".")
        modules = list(_along(model, owners))
        generator = torch_generator(seed, "init", path)
        rules = (rule for module in reversed(modules) if (rule := getattr(module, "init_parameter", None)))
        if any(rule(modules[-1], parameter, generator) for rule in rules):
            continue
        if parameter.dim() < 2:  # a bias, or the scale of a norm or of a layer
            nn.init.constant_(parameter, float(not name.endswith("bias")))
        else:
            nn.init.xavier_uniform_(parameter, generator=generator)


def _along(model: nn.Module, names: list[str]) -> Iterator[nn.Module]:
    """Yield `model` and its submodules along a path of names, outermost first."""
    yield model
    for name in names:
        model = getattr(model, name)
        yield model
