"""Measuring on the machine at hand: time, memory, quiet moments, what the machine is."""
