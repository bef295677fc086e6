"""Detectors: their parts, and how they are built, initialised, sped up and summarised."""
