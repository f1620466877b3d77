"""What scheduler and workers tell each other about dynamic requests, step by step."""

from dataclasses import dataclass, field

REPORT = "vllm_steer"
"""Where an engine output's ``kv_transfer_params`` carries strengths on to the frontend."""

Answer = dict[str, dict[int, float]]
"""By request and by index of its dose: the strengths that a step has worked out."""


@dataclass
class Turn:
    """What the requests and streams of a step read.

    steps   by id of those that read their last token: the generation step, which is the number of
            tokens generated so far
    tokens  by id of a base or probe: how many tokens it has generated, and the last of them, which
            the main stream has chosen; also where only a part of the text is read
    ahead   by id, as ``steps``: the tokens that asynchronous scheduling counted ahead of the step
    """

    steps: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, tuple[int, int]] = field(default_factory=dict)
    ahead: dict[str, int] = field(default_factory=dict)
