"""Fixtures with a fake engine and a fake judge, for all tests of this folder."""

from eval_tools import fake_engine, folder

__all__ = ["fake_engine", "folder"]
