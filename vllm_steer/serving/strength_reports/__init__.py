"""Brings the strengths of dynamic requests from the engine to outputs, responses and metrics."""
