"""Weights of a detector in and out: files of this project, of torchvision and of detectron2, read without running them."""
