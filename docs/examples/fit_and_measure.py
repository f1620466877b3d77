"""Fit a vector, save it, and measure it: ``python docs/examples/fit_and_measure.py``.

Everything here runs on Hugging Face's model. The file that it writes is what ``vllm serve
--steer-config`` loads, with the same effect.
"""

import dataclasses
import tempfile
from pathlib import Path

import torch

from vllm_steer import VectorSteer, hf, load_steer, save_steer
from vllm_steer.embedded import corpus, lexicon
from vllm_steer.fit import fit_vector
from vllm_steer.models import LanguageModel, load_language_model

PROMPTS = ["Hotel Astoria:", "Film Nova:", "Yoga Flora:", "Boutique Vega:"]
LAYER = 2


def texts(language: str) -> list[str]:
    """A hundred short reviews in one language."""
    return [sample.text for sample in corpus.generate(100, seed=1, language=language)]


def share_french(llm: LanguageModel, steer: VectorSteer, strength: float) -> float:
    """The share of 64 sampled continuations that are French, by the lexicon."""
    torch.manual_seed(1)
    is_french = []
    for prompt in PROMPTS:
        tokens = llm.tokenizer(prompt, return_tensors="pt")
        with hf.steered(llm.model, {"french": strength}, {"french": steer}):
            ids = llm.model.generate(
                **tokens,
                do_sample=True,
                max_new_tokens=24,
                num_return_sequences=16,
                pad_token_id=0,
            )
        made = llm.tokenizer.batch_decode(ids, skip_special_tokens=True)
        is_french += [lexicon.language(text) == "fr" for text in made]
    return sum(is_french) / len(is_french)


def main() -> None:
    """Fit, write the file, read it, and print the effect at several strengths."""
    llm = load_language_model("embedded")
    steer = fit_vector(llm.model, llm.tokenizer, texts("fr"), texts("en"), layers=[LAYER])
    noise = torch.randn(steer.vectors.shape, generator=torch.Generator().manual_seed(0))
    noise *= steer.vectors.norm() / noise.norm()
    random = dataclasses.replace(steer, vectors=noise)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "french.safetensors"
        save_steer(steer, path)
        loaded = load_steer(path)
    print(f"vector at {loaded.site} of layer {LAYER}, norm {loaded.vectors.norm():.1f}")
    print(f"{'strength':>8}{'the steer':>12}{'a random steer of equal norm':>32}")
    for strength in (-0.5, 0.0, 0.25, 0.5, 1.0):
        effect, control = (share_french(llm, one, strength) for one in (loaded, random))
        print(f"{strength:8}{effect:12.2f}{control:32.2f}")


if __name__ == "__main__":
    main()
