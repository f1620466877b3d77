"""Benchmark of dynamic strength: models, batches and figures."""
