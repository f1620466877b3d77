"""Benchmarks of single operations: cases, forms, baselines and measurement.

A case is a batch or a step: it makes sets of inputs, has a floor, and an ``Operation`` for each
form.
"""
