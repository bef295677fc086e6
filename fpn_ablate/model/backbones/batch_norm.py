"""Freeze batch norms: their statistics and affine parameters become constants."""

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """Frozen form of a BatchNorm that contains its activation, as timm's `BatchNormAct2d`; keeps the activation."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, eps=norm.eps)
        self.drop, self.act = norm.drop, norm.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm by its affine form with its current statistics (Detectron's default for fine-tuning)."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            has_activation = hasattr(child, "act")
            frozen = FrozenBatchNormAct2d(child) if has_activation else FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict({k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"})
            setattr(module, name, frozen.to(child.weight.device))
        else:
            freeze_batch_norm(child)
    return module
