"""Checks before and after a measurement: results must be equal."""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.decode import DecodeLeg, Steers
from benchmarks.dummy_model import ModelShape
from benchmarks.rounds import Round, plain_legs

CHECK_STEPS = 4


def check_operation(
    name: str, shape: ModelShape, dtype: torch.dtype, *, rank: int, rows: int
) -> None:
    """Check the backend of an engine with so many rows against float64, on random steers of the
    model's size, for ``steered``, ``guided`` or ``rotated``.
    """
    from benchmarks.operations.guidance import GuidanceCase
    from benchmarks.operations.lm_steer import LMSteerCase
    from benchmarks.operations.measure import MeasurementSetup, OperationCase

    case: OperationCase = LMSteerCase(shape.hidden_size, rank, rows, min(2, rows))
    if name != "steered":
        case = GuidanceCase("add" if name == "guided" else "rotate", rows, shape.hidden_size, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for inputs in case.sets(MeasurementSetup(device, dtype)):
        work = case.work("auto", inputs)
        work.check(work.run())


def check_engine(engine: Any, steers: Steers, shape: ModelShape) -> None:
    """Check that rows with a steer change and other rows of the batch keep every token and logprob.

    The check compares log probabilities and not tokens: under dummy weights, which vLLM draws from
    one seed for every tensor, the most likely token can be the same for every hidden state.
    """
    plain, mixed = (
        engine.leg(row_steers, CHECK_STEPS, shape.vocab_size, logprobs=True)
        for row_steers in ([None] * len(steers), steers)
    )
    for row, steer in enumerate(steers):
        tokens_kept = plain.tokens[row] == mixed.tokens[row]
        unchanged = tokens_kept and plain.logprobs[row] == mixed.logprobs[row]
        if steer is None:
            assert unchanged, f"unsteered row {row} of {len(steers)} was changed by its neighbours"
        else:
            assert not unchanged, f"row {row} of {len(steers)} was not changed by its steer {steer}"


def check_legs(rounds: Sequence[Round[DecodeLeg]], *, steered: bool) -> None:
    """Check that legs of one kind gave one output, and that both kinds agree without steers."""
    plain = {leg.tokens for leg in plain_legs(rounds)}
    other = {pair.other.tokens for pair in rounds}
    assert len(plain) == len(other) == 1, "legs of one kind gave different tokens"
    assert steered or plain == other, "two engines without steered rows gave different tokens"
