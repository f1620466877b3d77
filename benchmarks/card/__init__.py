"""One prepared run on a machine with a card: the pack, the phases, the checks of an engine."""
