"""Concept guidance on a pretrained model: the concept sentiment, as in its paper.

    python -m benchmarks.real_model.concept_guidance --data DIR --json OUT [--only PART,...]

``accuracy`` in the head has the probes' accuracies by layer; ``rows`` has a line for each condition
(steer, random steer of equal norm, no steer; a scale) of the parts ``probes`` and ``layers``.
Errors are those of ``vllm-steer eval``. A result has the parts of its own command only: with
``--only`` give another file.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from benchmarks.arguments import add_names
from benchmarks.engines import set_environment
from benchmarks.real_model.concept_guidance_table import concept_guidance_tables
from benchmarks.real_model.sentiment import balanced
from benchmarks.real_model.sentiment_run import (
    Row,
    SentimentRun,
    add_rows,
    examples,
    options,
    pnes_of,
)
from benchmarks.result import Result, console
from vllm_steer import VectorSteer, load_steer, save_steer
from vllm_steer.fit import activations, fit_concept
from vllm_steer.fit.concept import best_layers
from vllm_steer.fit.probes import PROBES, ProbeKind
from vllm_steer.texts import Conversation, LabelledText

PROBE: Final = "dim"
HALF: Final = 9  # of 18 layers, as the authors' 16 of 32
OTHERS: Final = (4, 18)
SCALES: Final = (-64.0, -32.0, -16.0, -8.0, 0.0, 8.0, 16.0, 32.0, 64.0)
NORM_SENTENCES: Final = 20


def conversations(sentences: list[LabelledText]) -> list[Conversation]:
    """Sentences as answers, each to a prompt of its own: answers to one prompt are never split."""
    return [
        Conversation(
            (
                {"role": "user", "content": f"What do you say of film {number}?"},
                {"role": "assistant", "content": text},
            ),
            int(label > 0),
        )
        for number, (text, label) in enumerate(sentences, 1)
    ]


def accuracy(run: SentimentRun, result: Result) -> None:
    """Accuracies of all probes in all layers, and the length of what the steer turns."""
    lengths = run.once("norms", lambda: norms(run))
    result.write(accuracy={probe: fit(run, probe)[1] for probe in PROBES}, norms=lengths)


def norms(run: SentimentRun) -> list[float]:
    """The mean length of a token's activation at ``attn_in``, by layer."""
    llm = run.language_model(run.args.model)
    texts = [sentence.text for sentence in run.sentences.steer[:NORM_SENTENCES]]
    chosen = range(llm.model.config.num_hidden_layers)
    read = activations(llm.model, llm.tokenizer, texts, site="attn_in", layers=chosen)
    lengths = torch.cat(list(read)).norm(dim=-1).mean(dim=0)  # over [tokens, layers, width]
    return [round(length, 2) for length in lengths.tolist()]


def fit(run: SentimentRun, probe: ProbeKind) -> tuple[VectorSteer, Row]:
    """The steer of a probe in all layers, fitted once, and its accuracies by layer."""
    steer, figures = (run.folder / f"{probe}.{suffix}" for suffix in ("safetensors", "json"))
    if not figures.exists():
        llm = run.language_model(run.args.model)
        console.print(f"fitting {probe} to {run.args.answers} answers")
        found = fit_concept(
            llm.model,
            llm.tokenizer,
            conversations(balanced(run.sentences.steer, run.args.answers)),
            probe=probe,
            signed=probe == "pca",
        )
        save_steer(found.steer, steer)
        layers: Row = {
            "train": [round(one.train_accuracy, 4) for one in found.probes],
            "validation": [round(one.validation_accuracy or 0.0, 4) for one in found.probes],
            "best": {str(k): best_layers(found.probes, k, "validation") for k in (HALF, *OTHERS)},
        }
        figures.write_text(json.dumps(layers), encoding="utf-8")
    loaded = load_steer(steer)
    assert isinstance(loaded, VectorSteer)
    return loaded, json.loads(figures.read_text(encoding="utf-8"))


def of_best_layers(run: SentimentRun, probe: ProbeKind, top_k: int) -> Path:
    """The file of the steer in the best layers by accuracy on held-out answers."""
    path = run.folder / f"{probe}-{top_k}.safetensors"
    if not path.exists():
        steer, figures = fit(run, probe)
        save_steer(steer.keep_layers(figures["best"][str(top_k)]), path)
    return path


def probes(run: SentimentRun, result: Result) -> None:
    """All scales with each kind of probe, in the best half of the layers."""
    pnes = {}
    for probe in PROBES:
        name = f"{probe}-{HALF}"
        report = run.evaluate(name, of_best_layers(run, probe, HALF), run.args.scales)
        add_rows(result, report, part="probes", probe=probe, layers=HALF)
        pnes[probe] = pnes_of(report)
    scale = run.args.layer_scale
    conditions = [f"steer{-scale:+g}", "none", f"steer{scale:+g}"]
    texts = list(examples(run.folder / f"{PROBE}-{HALF}", conditions))
    result.write(pnes=pnes, examples=texts)


def layers(run: SentimentRun, result: Result) -> None:
    """Fewer and more layers, at one scale."""
    scale = run.args.layer_scale
    for top_k in OTHERS:
        path = of_best_layers(run, PROBE, top_k)
        report = run.evaluate(f"{PROBE}-{top_k}", path, (-scale, 0.0, scale))
        add_rows(result, report, part="layers", probe=PROBE, layers=top_k)


PARTS: Final[dict[str, Callable[[SentimentRun, Result], None]]] = {
    part.__name__: part for part in (accuracy, probes, layers)
}


def main() -> None:
    """Run the parts, write, print the tables."""
    set_environment()
    parser = options(__doc__, "concept-guidance", samples=3)
    parser.add_argument("--answers", type=int, default=512, help="to fit probes to; paper: 512")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="of the guidance")
    parser.add_argument(
        "--layer-scale", type=float, default=16.0, help="of the part layers and the examples"
    )
    add_names(parser, "--only", PARTS)
    args = parser.parse_args()
    run = SentimentRun(args)
    settings = {**run.settings, "answers": args.answers, "site": "attn_in", "mode": "rotate"}
    result = Result("real_model_concept_guidance", args.json, **settings)
    run.parts({name: PARTS[name] for name in args.only}, result)
    print(concept_guidance_tables(result.data))


if __name__ == "__main__":
    main()
