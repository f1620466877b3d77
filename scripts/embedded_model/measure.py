"""Measure the embedded model's steers: `python scripts/embedded_model/measure.py [SETTING ...]`.

Each setting's texts are sampled at temperature 1 after headings that leave language, sentiment
and formality open; the figures are shares of the texts by `lexicon`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_steer import Steer, hf, load_steer
from vllm_steer.embedded import MODEL, STEERS, corpus, lexicon

SAMPLES: Final = 16
NEW_TOKENS: Final = 28

Strengths = Mapping[str, float | Mapping[str, Any]]

SETTINGS: Final[tuple[dict[str, Any], ...]] = (
    {},
    *({"french": v} for v in (2.5, 5)),
    *({"french-vector": v} for v in (3, 5, 7)),
    *({"german-vector": v} for v in (2.5, 3.5, 4.5)),
    *({"french-delta": v} for v in (1, 1.5, 2)),
    *({"german-delta": v} for v in (1, 1.5, 2)),
    {"french-delta": {"strength": 2, "schedule": "start"}},
    {"french-delta": {"strength": 2, "schedule": "dim"}},
    *({"formality-vector": v} for v in (-3, 3)),
    *({"formality-shift": v} for v in (-1.5, 1.5)),
    *({"french-vector": 5, "sentiment": v} for v in (-5, 5)),
    *({"french-delta": 1.5, "sentiment": v} for v in (-5, 5)),
    *({"french-vector": 5, "formality-vector": v} for v in (-3, 3)),
    {"french-delta": 1.5, "formality-vector": 3, "sentiment": 4},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", help="such as '{\"french-vector\": 6}'; JSON")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="texts per prompt")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    settings = [json.loads(text) for text in arguments.settings] or list(SETTINGS)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [
        {"steer": setting}
        | figures(sample(model, tokenizer, setting, embedded_steers(), samples=arguments.samples))
        for setting in track(settings, "sampling", console=Console(stderr=True))
    ]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        Console().print(_table(rows))


def embedded_steers() -> dict[str, Steer]:
    """All steers that come with the model, by name."""
    return {path.stem: load_steer(path) for path in sorted(STEERS.glob("*.safetensors"))}


def sample(
    model: Any,
    tokenizer: Any,
    strengths: Strengths,
    steers: Mapping[str, Steer],
    *,
    prompts: Sequence[str] = corpus.OPEN_PROMPTS,
    samples: int = SAMPLES,
    new_tokens: int = NEW_TOKENS,
    seed: int = 0,
) -> list[str]:
    """Continuations, `samples` for each prompt in turn, the same for the same arguments."""
    torch.manual_seed(seed)
    encoded = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    with hf.steered(model, strengths, steers):
        rows = model.generate(
            encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            num_return_sequences=samples,
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
        )
    answer_ids = rows[:, encoded["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(answer_ids, skip_special_tokens=True))


def figures(texts: Sequence[str]) -> dict[str, float]:
    """Shares of languages, positive and formal texts, distinct bigrams and known words."""
    languages = [lexicon.language(text) for text in texts]
    return {
        **{code: languages.count(code) / len(texts) for code in corpus.LANGUAGES},
        "positive": lexicon.positive_share(texts),
        "formal": sum(map(lexicon.formality, texts)) / len(texts),
        "distinct-2": lexicon.distinct_n(texts, 2),
        "known words": lexicon.known_share(texts),
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table()
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading == "steer" else "right")
    for row in rows:
        steer, *shares = row.values()
        table.add_row(json.dumps(steer), *(f"{share:.2f}" for share in shares))
    return table


if __name__ == "__main__":
    main()
