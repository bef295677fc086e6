"""Ablations of feature pyramids (Lin et al., CVPR 2017) over one shared two-stage detector core."""

__version__ = "0.1.0"
