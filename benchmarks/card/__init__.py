"""A prepared run on a machine with a GPU: the pack, the phases, the checks of an engine."""
