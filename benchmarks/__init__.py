"""Benchmarks of steering. Each is a module: ``python -m benchmarks.NAME --json OUT``."""
