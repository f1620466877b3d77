"""Benchmark of serving: servers, vLLM's clients, offline runs."""
