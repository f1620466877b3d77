"""The engine and the judge that stand in for real ones, for all tests of this folder."""

from eval_tools import folder, stand_in

__all__ = ["folder", "stand_in"]
