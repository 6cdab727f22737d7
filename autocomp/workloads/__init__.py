"""Workloads: how a model family is loaded, scored and timed. One file a family; torch loads on use."""
