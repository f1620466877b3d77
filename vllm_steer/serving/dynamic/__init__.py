"""Serving requests with dynamic strength: their streams, and the strengths of each token."""
