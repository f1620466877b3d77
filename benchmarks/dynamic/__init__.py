"""What dynamic strength costs: the models, the legs, the authors' own loop, the figures."""
