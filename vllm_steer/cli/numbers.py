"""The upper limit of numbers on the command line."""

from typing import Final

MOST: Final = 2**31 - 1
"""Maximum of counts and seeds that all libraries used here accept."""
