"""Kinds of bad input for scripts/drills/fuzz.py: a class each, whose `case` tries one input and names its ending."""
