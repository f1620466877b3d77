"""A peer and vllm-steer in one process, in legs that take turns."""

from functools import partial
from typing import Any

from decode import Comparison, compare, run_leg
from equality import check_engine, check_legs

from peers.job import Job

Asked = tuple[Any, str]  # an engine, and the steer that each row of it asks for


def compare_ours(job: Job, ours: Asked, rows: int) -> Comparison:
    """vllm-steer's steered legs over its unsteered ones; then each row is seen to be steered."""
    found = compare_legs(job, (ours[0], None), ours, rows)
    check_engine(ours[0], [ours[1]] * rows, job.dimensions)
    return found


def compare_beside(job: Job, ours: Asked, peer: Asked, rows: int) -> tuple[Comparison, Comparison]:
    """The peer's steered legs over its unsteered ones, and over vllm-steer's steered ones; then
    each row is seen to be steered."""
    within = compare_legs(job, (peer[0], None), peer, rows)
    across = compare_legs(job, ours, peer, rows)
    check_engine(peer[0], [peer[1]] * rows, job.dimensions)
    return within, across


def compare_legs(job: Job, plain: tuple[Any, str | None], other: Asked, rows: int) -> Comparison:
    """Legs of ``other`` between legs of ``plain``; each kind must repeat its tokens."""
    legs = [
        partial(run_leg, llm, [steer] * rows, job.steps, job.dimensions.vocab_size)
        for llm, steer in (plain, other)
    ]
    comparison = compare(*legs, rounds=job.repeats, tick=lambda: None)
    check_legs(comparison, steered=True)
    return comparison
