"""The kinds of bad input that scripts/drills/fuzz.py draws: a class each, whose `case` says what became of one."""
