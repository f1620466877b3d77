"""A peer in an environment of its own, where vllm-steer need not be installed."""

from typing import Any

from decode import Comparison, Leg, compare, run_leg

from peers.job import Job
from peers.lines import figure_line

RunLeg = Any  # as ``decode.run_leg``, which is the default


def compare_alone(
    job: Job, engine: Any, steer: str, software: str, leg: RunLeg = run_leg
) -> list[dict[str, Any]]:
    """Steered over unsteered requests of one engine, at each batch size."""
    found = (_compare(job, engine, rows, steer, leg) for rows in job.rows)
    return [figure_line(job, job.peer, software, comparison) for comparison in found]


def _compare(job: Job, engine: Any, rows: int, steer: str, leg: RunLeg) -> Comparison:
    def run(asked: str | None, **options: Any) -> Leg:
        return leg(engine, [asked] * rows, job.steps, job.dimensions.vocab_size, **options)

    check_changed(run(None, logprobs=True), run(steer, logprobs=True))
    found = compare(lambda: run(None), lambda: run(steer), job.repeats, lambda: None)
    check_changed(run(None, logprobs=True), run(steer, logprobs=True))
    return found


def check_changed(plain: Leg, steered: Leg) -> None:
    """Every row has other tokens or log probabilities than without a steer."""
    for row, tokens in enumerate(steered.tokens):
        kept = tokens == plain.tokens[row] and steered.logprobs[row] == plain.logprobs[row]
        assert not kept, f"row {row} of {len(steered.tokens)} was not changed by its steer"
