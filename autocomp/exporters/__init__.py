"""Exporters write a candidate to a folder: ``native`` runs on our kernels, others load in other software."""
