"""Helpers for tests of autocomp and of plug-ins: tiny models, conformance checks."""
