"""The operations that steer, one by one: their cases, forms and baselines, and their measuring.

A case is a batch or a step: it makes sets of inputs, knows its floor, and has a piece of work for
each form.
"""
