"""The upper limit of numbers on the command line."""

from typing import Final

MOST: Final = 2**31 - 1
"""Of counts and seeds: what every library underneath can count to."""
