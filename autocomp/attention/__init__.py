"""Compressed attention at run time: a plan, a cache that keeps what the plan says, and transformers' hook.

``plan`` is free of torch; ``ring``, ``cache`` and ``runtime`` are what a model runs with.
"""
