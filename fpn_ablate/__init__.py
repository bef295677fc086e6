"""Ablations of feature pyramids (Lin et al., CVPR 2017) over one shared two-stage detector core."""

import os

# torch asks Linux for pages of 2 MiB under its large tensors. Each training step gives its memory back and takes it again, and
# with pages of 4 KiB an operator on large maps spends more time on being given them than on its work. Read when torch allocates
# for the first time; where it is too late, or the system has no such pages, nothing changes.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


__version__ = "0.1.0"
