"""Stages of a run that are too long to stand in the pipeline, which calls them in order."""
