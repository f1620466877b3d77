"""Hostile and damaged files of steers: all kinds of them."""

import containers
import damaged_archives
import pickled_calls
import pickled_values
from kinds import Kinds

STEER_FILES = Kinds(
    pickled_calls.KINDS, damaged_archives.KINDS, pickled_values.KINDS, containers.KINDS
)
