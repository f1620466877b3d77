"""Messages between scheduler, workers and frontend about dynamic requests."""

from dataclasses import dataclass, field

STRENGTHS_KEY = "vllm_steer"
"""The key of an engine output's ``kv_transfer_params`` that carries strengths to the frontend."""

StrengthsByRequest = dict[str, dict[int, float]]
"""By request id and index of the dose: the strengths that a step has computed."""


@dataclass
class StreamStep:
    """What the requests and streams of one step compute; the scheduler attaches it to its output.

    steps   by id, where the last known token is computed: the generation step, which is the number
            of tokens generated before
    tokens  by id of a base or probe: how many tokens it has generated, and the last one, which the
            main stream has sampled; also where only a part of the text is computed
    ahead   by id, as ``steps``: the tokens that asynchronous scheduling has counted ahead
    """

    steps: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, tuple[int, int]] = field(default_factory=dict)
    ahead: dict[str, int] = field(default_factory=dict)
