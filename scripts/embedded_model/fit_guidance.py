"""Recipes for the embedded model's vectors and deltas; `fit_steers` runs them.

The model represents language and register, and its text keeps them, so these steers are differences
of means. It has no such direction for sentiment: the beginning of a review does not determine the
sentiment of the rest. The sentiment vector is fitted by likelihood, to English reviews.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from vllm_steer import DeltaSteer, VectorSteer
from vllm_steer.embedded import corpus, lexicon
from vllm_steer.embedded.corpus import Sample
from vllm_steer.fit import fit_delta, fit_vector, fit_vector_by_likelihood
from vllm_steer.fit.vector import Direction
from vllm_steer.steers import Mode
from vllm_steer.steers.sites import VectorSite

# Its own seed: the steers never use the model's training samples.
SEED: Final = 3_000_017
SAMPLES: Final = 2_400
PROMPTS: Final = 60
LIKELIHOOD_SAMPLES: Final = 4_000
LIKELIHOOD_STEPS: Final = 400
DELTA_STEPS: Final = 30
# The share of a delta that is left from one step to the next. A text that has turned French goes on
# in French by itself, and pushed at full strength it falls apart into words that are none; the
# strengths that Dynamic Activation Composition finds as it goes fall likewise.
DELTA_FADE: Final = 0.75
BATCH_SIZE: Final = 64


@dataclass(frozen=True)
class VectorRecipe:
    """The criterion of the two sets of texts of a vector, and its site and layers."""

    description: str
    is_positive: Callable[[Sample], bool]
    site: VectorSite
    mode: Mode
    direction: Direction
    layers: tuple[int, ...]


@dataclass(frozen=True)
class LikelihoodRecipe:
    """The layers of a vector for sentiment, fitted to reviews in one language."""

    description: str
    language: str
    layers: tuple[int, ...]


@dataclass(frozen=True)
class DeltaRecipe:
    """The language that a delta leads to, from English."""

    description: str
    language: str


def _in(language: str) -> Callable[[Sample], bool]:
    return lambda sample: sample.language == language


def _formal(sample: Sample) -> bool:
    return sample.formality == "formal"


Recipe = VectorRecipe | LikelihoodRecipe | DeltaRecipe
_ALL: Final = (0, 1, 2, 3)

RECIPES: Final[dict[str, Recipe]] = {
    "french-vector": VectorRecipe(
        "towards French, concept guidance after attention",
        _in("fr"),
        site="attn_out",
        mode="rotate",
        direction="unit",
        layers=_ALL,
    ),
    "german-vector": VectorRecipe(
        "towards German, concept guidance after attention",
        _in("de"),
        site="attn_out",
        mode="rotate",
        direction="unit",
        layers=_ALL,
    ),
    "formality-vector": VectorRecipe(
        "formal (+) or informal (-) wording, concept guidance before attention",
        _formal,
        site="attn_in",
        mode="rotate",
        direction="unit",
        layers=(1, 2, 3),
    ),
    "formality-shift": VectorRecipe(
        "formal (+) or informal (-) wording, added to the residual stream",
        _formal,
        site="resid",
        mode="add",
        direction="mean",
        layers=(0, 1),
    ),
    "sentiment-vector": LikelihoodRecipe(
        "positive (+) or negative (-) reviews in English, added after the last layer",
        "en",
        layers=(3,),
    ),
    "french-delta": DeltaRecipe("towards French, step by step", "fr"),
    "german-delta": DeltaRecipe("towards German, step by step", "de"),
}


def fit(
    recipe: Recipe, model: Any, tokenizer: Any, on_text: Callable[[int, int], None]
) -> VectorSteer | DeltaSteer:
    """Fit the steer of a recipe; ``on_text`` gets the number of texts read and the total."""
    steer: VectorSteer | DeltaSteer
    if isinstance(recipe, VectorRecipe):
        steer = _fit_vector(recipe, model, tokenizer, on_text)
    elif isinstance(recipe, LikelihoodRecipe):
        steer = _fit_by_likelihood(recipe, model, tokenizer, on_text)
    else:
        steer = _fit_delta(recipe, model, tokenizer, on_text)
    return dataclasses.replace(
        steer, base_model="vllm-steer/embedded", description=recipe.description
    )


def _fit_vector(
    recipe: VectorRecipe, model: Any, tokenizer: Any, on_text: Callable[[int, int], None]
) -> VectorSteer:
    samples = corpus.generate(SAMPLES, seed=SEED)
    total = SAMPLES if recipe.direction == "mean" else 2 * SAMPLES  # which reads them twice
    return fit_vector(
        model,
        tokenizer,
        [sample.text for sample in samples if recipe.is_positive(sample)],
        [sample.text for sample in samples if not recipe.is_positive(sample)],
        layers=recipe.layers,
        site=recipe.site,
        mode=recipe.mode,
        direction=recipe.direction,
        batch_size=BATCH_SIZE,
        on_text=lambda done: on_text(done, total),
    )


def _fit_by_likelihood(
    recipe: LikelihoodRecipe, model: Any, tokenizer: Any, on_text: Callable[[int, int], None]
) -> VectorSteer:
    samples = corpus.generate(LIKELIHOOD_SAMPLES, seed=SEED, language=recipe.language)
    return fit_vector_by_likelihood(
        model,
        tokenizer,
        [sample.text for sample in samples],
        [1.0 if sample.sentiment == "positive" else -1.0 for sample in samples],
        layers=recipe.layers,
        focus=lexicon.sentiment_spans,
        steps=LIKELIHOOD_STEPS,
        on_step=lambda step, _: on_text(step + 1, LIKELIHOOD_STEPS),
    )


def _fit_delta(
    recipe: DeltaRecipe, model: Any, tokenizer: Any, on_text: Callable[[int, int], None]
) -> DeltaSteer:
    steer = fit_delta(
        model,
        tokenizer,
        _first_sentences(recipe.language),
        _first_sentences("en"),
        steps=DELTA_STEPS,
        batch_size=BATCH_SIZE,
        on_prompt=lambda done: on_text(done, 2 * PROMPTS),
    )
    fade = DELTA_FADE ** torch.arange(DELTA_STEPS)
    return dataclasses.replace(steer, delta=steer.delta * fade[:, None, None])


def _first_sentences(language: str) -> list[str]:
    """Beginnings of reviews as prompts: the answer continues in their language."""
    texts = (sample.text for sample in corpus.generate(PROMPTS, seed=SEED, language=language))
    return [re.split(r"(?<=[.!])", text)[0] for text in texts]
