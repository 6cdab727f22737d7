"""Trackers record a study elsewhere (MLflow, an Optuna journal). Only the driver talks to them."""
