"""Examine a data set for what a user needs to know before a sweep."""
