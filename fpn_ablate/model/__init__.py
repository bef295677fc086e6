"""The detector: backbones, necks, heads, and how they are built."""
