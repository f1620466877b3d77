"""Fit the embedded model's steers: `python scripts/embedded_model/fit_steers.py [NAME ...]`.

LM-Steers are fitted here, vectors and deltas by `fit_guidance`. A fit of an LM-Steer makes its
texts most likely at strength +-1. The written file has a smaller epsilon, so that this point is at
strength 1 / unit, and strength +-5 is strong and still fluent.
"""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import fit_guidance
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_steer import LMSteer, Steer, save_steer
from vllm_steer.embedded import MODEL, STEERS, corpus
from vllm_steer.embedded.corpus import Sample
from vllm_steer.fit import fit_lm_steer
from vllm_steer.fit.lm_steer_settings import FitCallbacks

# Its own seed: the steers never use the model's training samples.
SEED: Final = 2_000_003
SAMPLES: Final = 4_000
RANK: Final = 32
STEPS: Final = 120
MAX_LENGTH: Final = 96
EPSILON: Final = 0.05


@dataclass(frozen=True)
class Recipe:
    """The recipe of one LM-Steer: the label of a sample, -1 or 1, and its unit of strength."""

    description: str
    label: Callable[[Sample], float]
    unit: float


def _language(code: str) -> Callable[[Sample], float]:
    return lambda sample: 1.0 if sample.language == code else -1.0


RECIPES: Final = {
    "sentiment": Recipe(
        "positive (+) or negative (-) reviews",
        lambda sample: 1.0 if sample.sentiment == "positive" else -1.0,
        unit=0.5,
    ),
    "formality": Recipe(
        "formal (+) or informal (-) wording",
        lambda sample: 1.0 if sample.formality == "formal" else -1.0,
        unit=0.5,
    ),
    "french": Recipe("French (+) or another language (-)", _language("fr"), unit=0.5),
    "german": Recipe("German (+) or another language (-)", _language("de"), unit=0.5),
    "spanish": Recipe("Spanish (+) or another language (-)", _language("es"), unit=0.5),
}
NAMES: Final = (*RECIPES, *fit_guidance.RECIPES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"what to fit, all by default: {', '.join(NAMES)}")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the model")
    parser.add_argument("--out", type=Path, default=STEERS, help="folder to write")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(NAMES)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or NAMES:
        save_steer(fit(name, arguments.model), arguments.out / f"{name}.safetensors")


def fit(name: str, folder: Path) -> Steer:
    """Fit one steer of the model in `folder` by its recipe."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with Progress() as progress:
        task = progress.add_task(name)
        if name in RECIPES:
            return _fit_lm_steer(
                RECIPES[name],
                model,
                tokenizer,
                lambda step, loss: progress.update(
                    task,
                    completed=step + 1,
                    total=STEPS,
                    description=f"{name}, loss {loss:.3f}",
                ),
            )
        return fit_guidance.fit(
            fit_guidance.RECIPES[name],
            model,
            tokenizer,
            lambda done, total: progress.update(task, completed=done, total=total),
        )


def _fit_lm_steer(
    recipe: Recipe, model: Any, tokenizer: Any, on_step: Callable[[int, float], None]
) -> LMSteer:
    samples = corpus.generate(SAMPLES, seed=SEED)
    steer = fit_lm_steer(
        model,
        tokenizer,
        [sample.text for sample in samples],
        [recipe.label(sample) for sample in samples],
        rank=RANK,
        epsilon=EPSILON,
        steps=STEPS,
        max_length=MAX_LENGTH,
        callbacks=FitCallbacks(on_step=on_step),
    )
    made = {**(steer.recipe or {}), "model": "embedded", "data": f"{SAMPLES} samples, seed {SEED}"}
    return dataclasses.replace(
        steer,
        epsilon=EPSILON * recipe.unit,
        base_model="vllm-steer/embedded",
        description=recipe.description,
        recipe=made,
    )


if __name__ == "__main__":
    main()
