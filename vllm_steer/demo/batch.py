"""The demo's requests: one prompt with different steers, given in every way that the API has."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_steer.demo.server import SERVED_NAME
from vllm_steer.embedded import lexicon

PROMPT = "Hotel Astoria:"
MAX_TOKENS = 28
PRESET = "french-thanks"

MEASURES: dict[str, Callable[[str], float]] = {
    "positive": lexicon.sentiment,
    "formal": lexicon.formality,
    "French": lambda text: float(lexicon.language(text) == "fr"),
    "German": lambda text: float(lexicon.language(text) == "de"),
}


@dataclass(frozen=True)
class Request:
    """A request: where its steer is given, and a description of the steers and strengths."""

    steer_carrier: str
    strengths: str
    extra_body: dict[str, Any] = field(default_factory=dict)
    model: str = SERVED_NAME


FIRST_STEP = {"french-delta": {"strength": 2, "schedule": "start"}}
COMPOSED = {"french-delta": "dynamic", "sentiment": {"strength": "dynamic", "max": 5}}
FORMAL_ANSWER = {"formality-vector": {"strength": 3, "layers": "2-3", "phase": "generation"}}

REQUESTS: tuple[Request, ...] = (
    Request("-", "no steer"),
    # LM-Steers: the input of the LM head.
    *(
        Request("vllm_xargs", f"sentiment {v:+g}", {"vllm_xargs": {"steer": f"sentiment:{v}"}})
        for v in (-5, -2.5, 2.5, 5)
    ),
    Request("body field", "formality -5", {"steer": "formality:-5"}),
    Request("body field", "french +5, sentiment -5", {"steer": {"french": 5, "sentiment": -5}}),
    # Steers inside the layers: concept vectors, an added vector, step deltas.
    Request("body field", "french-vector", {"steer": "french-vector"}),
    Request("body field", "german-vector +3.5", {"steer": {"german-vector": 3.5}}),
    Request("body field", "formality-vector +3", {"steer": "formality-vector:3"}),
    Request("body field", "formality-shift -1.5", {"steer": "formality-shift:-1.5"}),
    Request("body field", "sentiment-vector -2", {"steer": "sentiment-vector:-2"}),
    Request("body field", "formality-vector +3, answer, layers 2-3", {"steer": FORMAL_ANSWER}),
    Request("vllm_xargs", "german-delta +1.5", {"vllm_xargs": {"steer": "german-delta:1.5"}}),
    Request("body field", "french-delta +2, first step", {"steer": FIRST_STEP}),
    # Dynamic strengths.
    Request("body field", "german-delta, dynamic", {"steer": "german-delta:dynamic"}),
    Request("body field", "french-delta, sentiment, dynamic", {"steer": COMPOSED}),
    # Steers at the LM head and inside the layers.
    Request("body field", "german-vector, sentiment +5", {"steer": "german-vector,sentiment:5"}),
    Request(
        "model name",
        "french-delta +1.5, formality-vector +3, sentiment +4",
        model=f"{SERVED_NAME}:{PRESET}",
    ),
)


@dataclass(frozen=True)
class DemoResult:
    """The texts of one request and the mean of each measure over them."""

    request: Request
    texts: Sequence[str]
    shares: dict[str, float]

    @property
    def figures(self) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "asked_by": self.request.steer_carrier,
            "strengths": self.request.strengths,
            "shares": self.shares,
            "text": self.texts[0],
        }


async def ask_all(url: str, *, samples: int) -> list[DemoResult]:
    """Send all requests concurrently and measure their texts."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=url, api_key="none", timeout=120) as client:
        return list(await asyncio.gather(*(_ask(client, r, samples) for r in REQUESTS)))


async def _ask(client: Any, request: Request, samples: int) -> DemoResult:
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
    shares = {name: sum(map(measure, texts)) / len(texts) for name, measure in MEASURES.items()}
    return DemoResult(request, texts, shares)
