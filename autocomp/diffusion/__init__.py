"""Sampling from diffusion models: schedules of steps, noise levels, one interface of models, the loop."""
