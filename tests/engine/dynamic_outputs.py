"""Compares the output of vLLM for a dynamic request with the Hugging Face reference."""

from collections.abc import Mapping, Sequence
from typing import Any

from dynamic_reference import Trace, reference_generate

from vllm_steer import Steer
from vllm_steer.doses import Dose

ROUNDING = 1e-5
"""What float32 may do to a probability or a logprob."""


def assert_dynamic(
    output: Any,
    model: Any,
    doses: Sequence[Dose],
    steers: Mapping[str, Steer],
    *,
    greedy: bool = True,
    tolerance: float = 1e-3,
) -> Trace:
    """Check that every completion has the strengths of its text and the logprobs under them; every
    token of a ``greedy`` one is the reference's choice.

    If ``Q`` depends on rounding, either strength is correct; if the choice between two tokens does,
    either token is.
    """
    for completion in output.outputs:
        text, strengths = list(completion.token_ids), completion.steer_strengths
        trace = reference_generate(model, output.prompt_token_ids, doses, steers, forced=text)
        if history := _history(trace, strengths, tolerance):
            trace = reference_generate(
                model, output.prompt_token_ids, doses, steers, forced=text, history=history
            )
        for step, token in enumerate(text):
            if greedy and trace.margins[step] > ROUNDING:
                assert token == trace.choices[step], f"step {step}"
            if completion.logprobs is not None:
                logprob = completion.logprobs[step][token].logprob
                assert abs(logprob - float(trace.logprobs[step, token])) <= tolerance
    return trace


def _history(
    trace: Trace, actual: Mapping[str, Sequence[float]], tolerance: float
) -> dict[str, list[float]]:
    """Compare strengths; returns the history with the strengths that rounding changed."""
    assert actual is not None and actual.keys() == trace.strengths.keys()
    history = {}
    for name, expected in trace.strengths.items():
        assert len(actual[name]) == len(trace.tokens)
        errors = [abs(a - b) for a, b in zip(actual[name], expected, strict=True)]
        wrong_steps = [step for step, error in enumerate(errors) if error > tolerance]
        for step in wrong_steps:
            comparison = f"{name} step {step}: {actual[name][step]} for {expected[step]}"
            assert trace.boundaries[name][step] <= ROUNDING, comparison
        if wrong_steps:
            steps = zip(actual[name], expected, range(len(expected)), strict=True)
            history[name] = [
                computed if step in wrong_steps else right for computed, right, step in steps
            ]
    return history
