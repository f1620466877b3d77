"""What steering costs: each benchmark is a module, ``python -m benchmarks.NAME --json OUT``."""
