"""What vLLM says of a dynamic request, compared with what Hugging Face would have done."""

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
    """Every completion has the strengths of its text, and its logprobs under them; ``greedy`` ones
    have the reference's choice as every token.

    Where rounding decides what ``Q`` is, either strength is right, and where it decides between two
    tokens, either token.
    """
    for completion in output.outputs:
        text, given = list(completion.token_ids), completion.steer_strengths
        trace = reference_generate(model, output.prompt_token_ids, doses, steers, forced=text)
        if history := _history(trace, given, tolerance):
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
    trace: Trace, given: Mapping[str, Sequence[float]], tolerance: float
) -> dict[str, list[float]]:
    """Compare strengths; the history of those that rounding has made others."""
    assert given is not None and given.keys() == trace.strengths.keys()
    history = {}
    for name, wanted in trace.strengths.items():
        assert len(given[name]) == len(trace.tokens)
        errors = [abs(a - b) for a, b in zip(given[name], wanted, strict=True)]
        wrong = [step for step, error in enumerate(errors) if error > tolerance]
        for step in wrong:
            said = f"{name} step {step}: {given[name][step]} for {wanted[step]}"
            assert trace.boundaries[name][step] <= ROUNDING, said
        if wrong:
            steps = zip(given[name], wanted, range(len(wanted)), strict=True)
            history[name] = [own if step in wrong else right for own, right, step in steps]
    return history
