"""Executors run work on long-lived workers: in local processes or as Ray actors, one interface."""
