"""What dynamic strength costs: the models and their batches, and the figures."""
