"""The distinct requests, and what each answers when it runs alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

NAME: Final = "NAME"
"""Stands for the name of a loaded steer in a setting."""
LEAST_GAP: Final = 1e-3
"""Between the logprobs of the two likeliest tokens: nearer ones may change places with rounding."""

Doses = tuple[tuple[str, str], ...]
"""Name and strength of each steer, as ``X-Steer`` has them."""


@dataclass(frozen=True)
class Setting:
    """A request's steering: fields of its body, and the doses that they mean."""

    name: str
    fields: dict[str, Any]
    doses: Doses = ()

    def of(self, name: str) -> "Setting":
        """The setting with the name of a loaded steer."""
        steer = {name if key == NAME else key: v for key, v in self.fields["steer"].items()}
        doses = tuple((name if one == NAME else one, strength) for one, strength in self.doses)
        return Setting(self.name, {"steer": steer}, doses)


_OPENING = {"french-vector": {"strength": 5, "phase": {"answer": "0:4"}}}
_FORMAL = {"sentiment": {"strength": 5, "when": "formal-prompt"}}
_PRAISING = {"german-vector": {"strength": 5, "when": "praising-prompt", "phase": "generation"}}
_REPLY = {"formality-vector": {"strength": 3, "layers": "2-3", "phase": "generation"}}
CONFIGURED: Final[tuple[Setting, ...]] = (
    Setting("unsteered", {}),
    Setting("none", {"steer": "none"}),
    Setting("LM-Steer", {"steer": "sentiment:5"}, (("sentiment", "5"),)),
    Setting("vector, rotated", {"steer": {"french-vector": 5}}, (("french-vector", "5"),)),
    Setting("delta", {"vllm_xargs": {"steer": "german-delta"}}, (("german-delta", "1.5"),)),
    Setting("delta, dynamic", {"steer": "german-delta:dynamic"}, (("german-delta", "dynamic"),)),
    Setting(
        "two LM-Steers",
        {"steer": {"french": 5, "sentiment": -5}},
        (("french", "5"), ("sentiment", "-5")),
    ),
    Setting("LM-Steer, dynamic", {"steer": "sentiment:dynamic"}, (("sentiment", "dynamic"),)),
    Setting("LM-Steer, negative", {"steer": {"sentiment": -5}}, (("sentiment", "-5"),)),
    Setting("vector, added", {"steer": "sentiment-vector:-2"}, (("sentiment-vector", "-2"),)),
    Setting("vector of the answer", {"steer": _REPLY}, (("formality-vector", "3"),)),
    Setting(
        "delta, first step",
        {"steer": {"french-delta": {"strength": 2, "schedule": "start"}}},
        (("french-delta", "2"),),
    ),
    Setting(
        "vector and LM-Steer",
        {"steer": "german-vector,sentiment:5"},
        (("german-vector", "3.5"), ("sentiment", "5")),
    ),
    Setting(
        "preset", {"steer": "polite-praise"}, (("sentiment", "4"), ("formality", "4"))
    ),
    Setting("ablation", {"steer": {"ablate-french": 1}}, (("ablate-french", "1"),)),
    Setting("opening of the answer", {"steer": _OPENING}, (("french-vector", "5"),)),
    Setting("LM-Steer on a condition", {"steer": _FORMAL}, (("sentiment", "5"),)),
    Setting("vector on a condition", {"steer": _PRAISING}, (("german-vector", "5"),)),
)  # fmt: skip
LOADED: Final[tuple[Setting, ...]] = (
    Setting("loaded", {"steer": {NAME: 2}}, ((NAME, "2"),)),
    Setting("loaded and LM-Steer", {"steer": {NAME: 1.5, "sentiment": 3}},
            ((NAME, "1.5"), ("sentiment", "3"))),
)  # fmt: skip
PROMPTS: Final = (
    "Hotel Astoria: We stayed here for a week in May, and the room was clean",
    "Cafe Luna:",
    "The food came late, the soup was cold and nobody at the table wanted",
    "Museum: We were in the old town and went to see the new rooms on the second floor. In short,",
    "Restaurant Roma: The waiter was",
    "Once upon a time there was a small hotel by the sea, and the people",
    "This is the best place",
    "The staff were not friendly at all and the breakfast was bad, so we",
)
"""Of 8 to 35 tokens; four of them and their answers need a second block of 32 halfway."""


@dataclass(frozen=True)
class Case:
    """A distinct request; ``content`` is what its loaded name means."""

    prompt: int
    setting: Setting
    content: str | None = None

    @property
    def key(self) -> tuple[int, str, str | None]:
        """What the answer depends on."""
        return self.prompt, self.setting.name, self.content


def body_of(case: Case, model: str, max_tokens: int) -> dict[str, Any]:
    """The body of a completion, greedy and of an exact length."""
    return {
        "model": model,
        "prompt": PROMPTS[case.prompt],
        "max_tokens": max_tokens + case.prompt % 3 * 2,
        "temperature": 0,
        "ignore_eos": True,
        **case.setting.fields,
    }


def all_cases(prompts: int, settings: int, contents: Sequence[str]) -> list[Case]:
    """Prompts x settings, and x contents where a setting has a loaded steer."""
    cases = [Case(p, setting) for p in range(prompts) for setting in CONFIGURED[:settings]]
    return cases + [
        Case(p, setting, content)
        for content in contents
        for p in range(prompts)
        for setting in LOADED
    ]


def least_gap(choice: dict[str, Any]) -> float:
    """The least gap between the two likeliest tokens over all steps of a choice."""
    steps = [sorted(step.values())[-2:] for step in choice["logprobs"]["top_logprobs"]]
    return min((step[1] - step[0] if len(step) == 2 else 0.0) for step in steps)
