"""LM-Steer on a pretrained model: sentiment as in its paper, and what else the paper claims.

    python -m benchmarks.real_model.lm_steer --data DIR --json OUT [--only PART,...]

``rows`` has a line for each condition (steer, random steer of equal norm, no steer; a strength) of
the parts ``strengths``, ``ranks``, ``french`` and ``transfer``; ``words`` and ``evidence`` are in
the head. Errors are those of ``vllm-steer eval``. A result has the parts of its own command only:
with ``--only`` give another file.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import yaml

from benchmarks.arguments import add_names, numbers
from benchmarks.engines import set_environment
from benchmarks.real_model.experiment import BUILD
from benchmarks.real_model.french import DEMONSTRATIONS, INSTRUCTIONS
from benchmarks.real_model.lm_steer_table import lm_steer_tables
from benchmarks.real_model.sentiment import VerdictJudge, balanced
from benchmarks.real_model.sentiment_run import (
    ENGINE,
    EXAMPLES,
    Row,
    SentimentRun,
    add_rows,
    examples,
    options,
    pnes_of,
    rounded,
)
from benchmarks.result import Result, console
from vllm_steer import LMSteer, load_steer, save_steer
from vllm_steer.cli.progress import progress
from vllm_steer.evaluation import ComparisonSettings, Judge, compare
from vllm_steer.evaluation.languages import detect_languages
from vllm_steer.evaluation.lexicons import read_lexicon
from vllm_steer.fit import fit_delta, fit_lm_steer
from vllm_steer.fit.lm_steer_settings import FitCallbacks
from vllm_steer.inspection import nearest_tokens, text_evidence
from vllm_steer.models import LanguageModel
from vllm_steer.texts import LabelledText
from vllm_steer.texts.icl import icl_prompts, read_examples
from vllm_steer.transfer import match_strength, measure_effect, transfer_steer

RANKS: Final = (16, 64, 256)
RANK: Final = 64
STRENGTHS: Final = (-5.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 5.0)
ENDS: Final = (-5.0, 0.0, 5.0)
EVIDENCE_SENTENCES: Final = 10
EFFECT_SENTENCES: Final = 60
TRANSFER_STRENGTHS: Final = (-5.0, -2.0, 0.0, 2.0, 5.0)
# The French delta: 20 prompts of 4 demonstrations and a question in each language.
FRENCH_ROWS: Final = 100
FRENCH_STEPS: Final = 20
FRENCH_WORDS: Final = Path(__file__).with_name("french-words.yaml")


def fits(run: SentimentRun, result: Result) -> None:
    """All steers of the other parts."""
    for rank in {RANK, *run.args.ranks}:
        fit_steer(run, rank)
    fit_french(run)


def strengths(run: SentimentRun, result: Result) -> None:
    """Sentiment at each strength: is the effect monotone, what does it cost?"""
    report = run.evaluate("strengths", fit_steer(run, RANK), STRENGTHS)
    add_rows(result, report, part="strengths", rank=RANK)
    texts = examples(run.folder / "strengths", ("steer-5", "none", "steer+5"))
    result.write(pnes=pnes_of(report), examples=list(texts))


def ranks(run: SentimentRun, result: Result) -> None:
    """The ends of the scale with steers of other ranks."""
    for rank in run.args.ranks:
        if rank != RANK:
            report = run.evaluate(f"rank-{rank}", fit_steer(run, rank), ENDS)
            add_rows(result, report, part="ranks", rank=rank)


def words(run: SentimentRun, result: Result) -> None:
    """The nearest tokens of the steer's leading directions."""
    result.write(words=run.once("words", lambda: _words(run)))


def _words(run: SentimentRun) -> list[Row]:
    steer = load_steer(fit_steer(run, RANK))
    llm = run.language_model(run.args.model)
    embedding = llm.model.get_output_embeddings().weight
    return [
        {
            "direction": near.label,
            "singular_value": round(near.weight, 3),
            "highest": [token.text for token in near.highest],
            "lowest": [token.text for token in near.lowest],
        }
        for near in nearest_tokens(steer, embedding, llm.tokenizer, top=4, count=12)
    ]


def evidence(run: SentimentRun, result: Result) -> None:
    """Which side the steer puts held-out sentences on, and the span that says so."""
    result.write(**run.once("evidence", lambda: _evidence_of_sentences(run)))


def _evidence_of_sentences(run: SentimentRun) -> Row:
    steer = load_steer(fit_steer(run, RANK))
    assert isinstance(steer, LMSteer)
    llm = run.language_model(run.args.model)
    decided = balanced(run.sentences.held_out, EFFECT_SENTENCES)
    return {
        "evidence": [_evidence(llm, steer, s) for s in decided[:EVIDENCE_SENTENCES]],
        "effect": rounded(asdict(measure_effect(llm, steer, decided))),
    }


def _evidence(llm: LanguageModel, steer: LMSteer, sentence: LabelledText) -> Row:
    found = text_evidence(llm, steer, sentence.text, spans=1, longest=6)
    side = found.spans_for if found.label > 0 else found.spans_against
    return {
        "label": sentence.label,
        "text": sentence.text,
        "total": round(found.total, 3),
        "side": found.label,
        "span": side[0].text if side else "",
    }


def french(run: SentimentRun, result: Result) -> None:
    """The steer with a French delta at once, each at its own strength."""
    file = run.folder / "french.yaml"
    file.write_text(yaml.safe_dump(_properties(run), sort_keys=False), encoding="utf-8")
    settings = ComparisonSettings(
        model=run.args.model,
        file=file,
        prompts=run.prompts,
        folder=run.folder / "french",
        sampling=run.sampling,
        engine=ENGINE,
    )

    def judges(_: Sequence[str]) -> tuple[list[Judge], dict[str, str]]:
        made, missing = run.make_judges(run.args.model)
        of_words = VerdictJudge("french_words", read_lexicon(FRENCH_WORDS))
        return [*made, VerdictJudge("language", is_french), of_words], missing

    console.print("french: the delta and the steer, alone and together")
    report = compare(settings, judges, progress)
    rows = report.rows
    unsteered = [row for row in rows if row.row.title == "none"][:1]
    texts = []
    for found in [*unsteered, *(row for row in rows if row.row.title == "fixed")]:
        name = "+".join(found.row.candidate.steer) or "none"
        figures = {judge: rounded(values) for judge, values in found.judges.items()}
        result.add({"part": "french", "steers": name, **figures})
        texts += [
            {"condition": name, "prompt": answer.prompt, "text": answer.texts[0]}
            for answer in found.answers[EXAMPLES]
        ]
    strength = report.selected.methods["fixed"].doses["fr"]["strength"]
    result.write(french_examples=texts, french_strength=strength)


def is_french(text: str) -> float:
    """1.0 if French is the most probable language by langdetect, else 0.0."""
    return float(next(iter(detect_languages(text)), None) == "fr")


def _properties(run: SentimentRun) -> Row:
    """French, and the two ends of the steer, as the properties of a comparison."""
    sentiment = {"steer": fit_steer(run, RANK).name, "judge": f"lexicon:{FRENCH_WORDS}"}
    up, down = ({**sentiment, "strengths": [strength]} for strength in (5, -5))
    delta = {"steer": fit_french(run).name, "judge": "language:fr"}
    return {
        "properties": {
            "fr": {**delta, "strengths": run.args.french},
            "up": up,
            "down": {**down, "opposite": True},
        },
        "seen": ["fr", "up", "down"],
        "unseen": ["fr+up", "fr+down"],
        "methods": ["none", "fixed"],
    }


def transfer(run: SentimentRun, result: Result) -> None:
    """The steer on a model with another vocabulary, without any training there."""
    path = run.folder / "transferred.safetensors"
    result.write(transfer=run.once("transfer-figures", lambda: _transfer(run, path)))
    report = run.evaluate("transfer", path, TRANSFER_STRENGTHS, model=run.args.target)
    add_rows(result, report, part="transfer", rank=RANK)


def _transfer(run: SentimentRun, path: Path) -> Row:
    """Map the steer, match its effect on held-out sentences, write it."""
    steer = load_steer(fit_steer(run, RANK))
    assert isinstance(steer, LMSteer)
    source, target = run.language_model(run.args.model), run.language_model(run.args.target)
    pairs = [(llm.model.get_output_embeddings().weight, llm.tokenizer) for llm in (source, target)]
    transferred = transfer_steer(steer, *pairs)
    sentences = balanced(run.sentences.held_out, EFFECT_SENTENCES)
    wanted = measure_effect(source, steer, sentences)
    before = measure_effect(target, transferred.steer, sentences)
    matched, after = match_strength(target, transferred.steer, sentences, wanted)
    save_steer(matched, path)
    fit = transferred.fit
    assert fit is not None
    effects = {"source": wanted, "before": before, "after": after}
    return {
        "target": Path(run.args.target).name,
        "shared_tokens": len(transferred.shared),
        "mean_cosine": round(fit.mean_cosine, 4),
        "epsilon_factor": round(matched.epsilon / steer.epsilon, 3),
        **{name: rounded(asdict(effect)) for name, effect in effects.items()},
    }


def fit_steer(run: SentimentRun, rank: int) -> Path:
    """The steer of a rank, fitted once: the paper's recipe but for rank and steps."""
    path = run.folder / f"sentiment-{rank}.safetensors"
    if path.exists():
        return path
    llm = run.language_model(run.args.model)
    texts, labels = zip(*run.sentences.steer, strict=True)
    steps = run.args.steps

    def on_step(step: int, loss: float) -> None:
        if (step + 1) % 10 == 0:
            console.print(f"rank {rank}, step {step + 1} of {steps}: loss {loss:.3f}")

    steer = fit_lm_steer(
        llm.model,
        llm.tokenizer,
        texts,
        labels,
        rank=rank,
        steps=steps,
        run_folder=run.folder / f"fit-{rank}",
        callbacks=FitCallbacks(on_step=on_step),
    )
    save_steer(steer, path)
    return path


def fit_french(run: SentimentRun) -> Path:
    """The French delta, fitted once to parallel rows of Dynamic Activation Composition."""
    path = run.folder / "french.safetensors"
    if path.exists():
        return path
    llm = run.language_model(run.args.model)
    sides = [_demonstrations(run, name, line) for name, line in INSTRUCTIONS.items()]
    save_steer(fit_delta(llm.model, llm.tokenizer, *sides, steps=FRENCH_STEPS), path)
    return path


def _demonstrations(run: SentimentRun, name: str, instruction: str) -> list[str]:
    rows = read_examples(run.args.data / "dac" / f"{name}.json")[:FRENCH_ROWS]
    return icl_prompts(rows, DEMONSTRATIONS, instruction=instruction)


PARTS: Final[dict[str, Callable[[SentimentRun, Result], None]]] = {
    part.__name__: part for part in (fits, strengths, ranks, words, evidence, french, transfer)
}


def main() -> None:
    """Run the parts, write, print the tables."""
    set_environment()
    parser = options(__doc__, "lm-steer")
    parser.add_argument("--target", default=str(BUILD / "smollm2-135m"), help="of the transfer")
    parser.add_argument("--steps", type=int, default=60, help="of a fit; paper: 1000")
    parser.add_argument("--ranks", type=numbers, default=RANKS, help=f"beside {RANK}")
    found = "strengths of the French delta to choose from"
    parser.add_argument("--french", type=float, nargs="+", default=[1.0, 2.0], help=found)
    add_names(parser, "--only", PARTS)
    args = parser.parse_args()
    run = SentimentRun(args)
    result = Result("real_model_lm_steer", args.json, **run.settings, rank=RANK, steps=args.steps)
    run.parts({name: PARTS[name] for name in args.only}, result)
    print(lm_steer_tables(result.data))


if __name__ == "__main__":
    main()
