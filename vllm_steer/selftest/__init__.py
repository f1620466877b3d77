"""Dummy runs that find where a model can be steered, and verify that it is."""
