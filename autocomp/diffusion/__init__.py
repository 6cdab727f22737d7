"""Sampling from diffusion models: schedules of steps, noise levels, models behind one interface, and the loop."""
