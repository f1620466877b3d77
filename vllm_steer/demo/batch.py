"""The demo's requests: one prompt, asked at once under different steers in each way there is."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_steer.demo.server import SERVED_NAME
from vllm_steer.embedded import lexicon

PROMPT = "The hotel was"
MAX_TOKENS = 28
PRESET = "polite-praise"


@dataclass(frozen=True)
class Request:
    """How a request asks for its steer, and the property that it should change."""

    asked_by: str
    strengths: str
    extra_body: dict[str, Any]
    measure: str
    model: str = SERVED_NAME


REQUESTS: tuple[Request, ...] = (
    Request("no steer", "-", {}, "positive"),
    *(
        Request(
            "vllm_xargs",
            f"sentiment {v:+g}",
            {"vllm_xargs": {"steer": f"sentiment:{v}"}},
            "positive",
        )
        for v in (-5, -2.5, 2.5, 5)
    ),
    Request("body field", "french +5", {"steer": {"french": 5}}, "French"),
    Request("body field", "german +5", {"steer": {"german": 5}}, "German"),
    Request("body field", "formality -5", {"steer": {"formality": -5}}, "formal"),
    Request(
        "model name",
        "sentiment +4, formality +4",
        {},
        "positive",
        model=f"{SERVED_NAME}:{PRESET}",
    ),
    Request(
        "body field",
        "french +5, sentiment -5",
        {"steer": {"french": 5, "sentiment": -5}},
        "French",
    ),
)

_MEASURES: dict[str, Callable[[str], float]] = {
    "positive": lexicon.sentiment,
    "formal": lexicon.formality,
    "French": lambda text: float(lexicon.language(text) == "fr"),
    "German": lambda text: float(lexicon.language(text) == "de"),
}


@dataclass(frozen=True)
class Answer:
    """The texts of one request; ``share`` is the mean of its measure over them."""

    request: Request
    texts: Sequence[str]
    share: float

    @property
    def asked_by(self) -> str:
        """The way the request asked."""
        return self.request.asked_by

    @property
    def strengths(self) -> str:
        """Steers and strengths, for the table."""
        return self.request.strengths

    @property
    def measured(self) -> str:
        """The share in words."""
        return f"{self.share:.0%} {self.request.measure}"

    @property
    def figures(self) -> dict[str, Any]:
        """The answer as plain data."""
        return {
            "asked_by": self.asked_by,
            "strengths": self.strengths,
            "measure": self.request.measure,
            "share": self.share,
            "text": self.texts[0],
        }


async def ask_all(url: str, *, samples: int) -> list[Answer]:
    """Send every request at once and measure what comes back."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=url, api_key="none", timeout=120) as client:
        return list(await asyncio.gather(*(_ask(client, r, samples) for r in REQUESTS)))


async def _ask(client: Any, request: Request, samples: int) -> Answer:
    completion = await client.completions.create(
        model=request.model,
        prompt=PROMPT,
        n=samples,
        max_tokens=MAX_TOKENS,
        temperature=1.0,
        seed=1,
        extra_body=request.extra_body,
    )
    texts = [PROMPT + choice.text for choice in completion.choices]
    measure = _MEASURES[request.measure]
    return Answer(request, texts, sum(map(measure, texts)) / len(texts))
