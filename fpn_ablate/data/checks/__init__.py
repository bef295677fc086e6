"""Checks of COCO-format sets: annotations, boxes and image files."""
