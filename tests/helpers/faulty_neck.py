"""A folder for --config-dir with a neck that strikes rank 1 in its second training step, as the variable FAULT says."""

FILES = {
    "necks.py": """
        import os
        import signal

        import torch
        from torch import nn

        from fpn_ablate.model.necks.base import Neck
        from fpn_ablate.structures.levels import Level


        class Faulty(Neck):
            def __init__(self, in_levels, *, channels: int):
                super().__init__()
                self.calls, self.levels = 0, tuple(Level(f"p{level.name[1:]}", channels) for level in in_levels)
                self.convs = nn.ModuleList(nn.Conv2d(level.channels, channels, 1) for level in in_levels)

            def forward(self, features):
                trains = self.training and torch.is_grad_enabled() and not features["c2"].is_meta  # not when it is checked
                self.calls += trains and os.environ.get("RANK") == "1"
                fault = os.environ.get("FAULT") if self.calls == 2 else None
                if fault in ("SIGTERM", "SIGKILL"):
                    os.kill(os.getpid(), getattr(signal, fault))
                elif fault == "memory":
                    raise torch.cuda.OutOfMemoryError("Tried to allocate 2 GiB")
                maps = (conv(x) for conv, x in zip(self.convs, features.values(), strict=True))
                return dict(zip((level.name for level in self.levels), maps, strict=True))
    """,
    "neck/faulty.yaml": "class: necks.Faulty\nchannels: ${recipe.channels}\n",
}
