"""Limits of the boxes that pictures show: the best proposals of an image, and the detections of a high score."""

MAX_PROPOSALS = 20  # their scores are not comparable with a detection's
MIN_SCORE = 0.5
