"""Two and three properties at once: fixed, scheduled and dynamic strengths of three deltas.

    python -m benchmarks.real_model.several_properties --data DIR --json OUT

The deltas are French answers (over English ones), casual (over formal) and cheerful (over grumpy),
each fitted on demonstrations with one property only, as Scalena et al. (BlackboxNLP 2024, section
5.2) compose language with safety or formality. ``vllm-steer compare`` chooses the strengths on the
seen combinations, with other questions than those of the report. ``manners.py`` has the data.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.composition_report import in_words
from benchmarks.engines import set_environment
from benchmarks.real_model.experiment import language_model, parser, seconds_of, timed
from benchmarks.real_model.french import (
    DEMONSTRATIONS,
    INSTRUCTIONS,
    QUESTIONS,
    SUPPORT,
    fit_french,
    sampling,
)
from benchmarks.real_model.manners import JUDGES, OPPOSITE, in_manner
from benchmarks.real_model.tables import real_model
from benchmarks.result import Result
from vllm_steer.evaluation.composition.property_judges import Verdicts
from vllm_steer.evaluation.means import mean
from vllm_steer.evaluation.standard_errors import with_errors

STEPS: Final = 30
CHOOSING: Final = 10
Line = dict[str, Any]


def main() -> None:
    """Fit, compare, write, print."""
    set_environment()
    options = parser(__doc__, "several-properties")
    options.add_argument("--questions", type=int, default=40, help="of the report; at most 50")
    options.add_argument("--samples", type=int, default=3, help="texts per question")
    args = options.parse_args()
    if not 1 <= args.questions <= QUESTIONS:
        options.error(f"--questions: {QUESTIONS} are not used to fit; give 1 to {QUESTIONS}")
    result = Result(
        "real_model_several_properties",
        args.json,
        model=Path(args.model).name,
        questions=args.questions,
        choosing=CHOOSING,
        samples=args.samples,
        max_tokens=STEPS,
    )
    args.folder.mkdir(parents=True, exist_ok=True)
    with timed(args.folder, "fit"):
        write_steers(args.model, args.data / "dac", args.folder)
    write_files(args.data / "dac", args.folder, args.questions)
    with timed(args.folder, "compare"):
        report = compare(args.model, args.folder, args.samples)
    result.data |= {"chosen": {m: in_words(c.doses) for m, c in report.selected.methods.items()}}
    for line in lines(report):
        result.add(line)
    result.write(tried=list(tried(report.data)), seconds=seconds_of(args.folder))
    print(real_model(result.data))


def write_steers(model: str, data: Path, folder: Path) -> None:
    """Fit the three deltas, each saved as soon as it is made."""
    from vllm_steer.files import save_steer

    for name in ("french", *JUDGES):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            save_steer(
                fit_french(model, data) if name == "french" else fit_manner(model, data, name), path
            )


def fit_manner(model: str, data: Path, manner: str) -> Any:
    """English answers in a manner minus the same answers in the opposite one."""
    from vllm_steer.cli.progress import progress
    from vllm_steer.fit import fit_delta
    from vllm_steer.texts.icl import Example, icl_prompts, read_examples, support

    examples = read_examples(data / "ENG.json")
    sides = [
        icl_prompts(
            [
                Example(row.input, in_manner(row.output, side, index))
                for index, row in enumerate(examples)
            ],
            DEMONSTRATIONS,
            instruction=INSTRUCTIONS["ENG"],
        )[QUESTIONS:]
        for side in (manner, OPPOSITE[manner])
    ]
    wanted, other = support(*sides, SUPPORT, 32)
    language = language_model(model)
    with progress(f"fitting {manner}", 2 * SUPPORT) as advance:
        return fit_delta(
            language.model, language.tokenizer, wanted, other, steps=STEPS, on_prompt=advance
        )


def write_files(data: Path, folder: Path, questions: int) -> None:
    """The prompts, the judges' word lists, and the comparison's description."""
    from vllm_steer.texts.icl import read_examples

    rows = read_examples(data / "ENG.json")
    groups = [
        rows[start : start + DEMONSTRATIONS + 1]
        for start in range(0, len(rows), DEMONSTRATIONS + 1)
    ]
    _write_prompts(folder / "prompts.jsonl", [group[-1].input for group in groups[:questions]])
    _write_prompts(folder / "choosing.jsonl", [group[0].input for group in groups[:CHOOSING]])
    for manner, (words, opposite) in JUDGES.items():
        lexicon = {"positive": words, "negative": opposite}
        text = json.dumps(lexicon, ensure_ascii=False)
        (folder / f"{manner}.json").write_text(text, encoding="utf-8")
    judges = {name: f"lexicon:{folder.absolute() / name}.json" for name in JUDGES}
    spec = {
        "properties": {
            name: {
                "steer": f"{name}.safetensors",
                "judge": judges.get(name, "language:fr"),
                "strengths": [1.0, 1.5],
                "max": [1.5, 2.5],
            }
            for name in ("french", *JUDGES)
        },
        "seen": ["french", *JUDGES, "french+casual"],
        "unseen": ["french+cheerful", "casual+cheerful", "french+casual+cheerful"],
        "methods": ["none", "fixed", "dim", "dynamic"],
        "top_p": [0.5],
    }
    (folder / "properties.json").write_text(json.dumps(spec), encoding="utf-8")


def _write_prompts(path: Path, questions: Sequence[str]) -> None:
    rows = [json.dumps({"prompt": f"Q:{question}\nA:"}) + "\n" for question in questions]
    path.write_text("".join(rows), encoding="utf-8")


def compare(model: str, folder: Path, samples: int) -> Any:
    """The report of ``vllm-steer compare``."""
    from vllm_steer.cli.progress import progress
    from vllm_steer.evaluation.composition import comparison_run
    from vllm_steer.evaluation.generation import EngineOptions
    from vllm_steer.evaluation.judges import make_judges
    from vllm_steer.evaluation.prompts import read_prompts

    settings = comparison_run.ComparisonSettings(
        model=model,
        file=folder / "properties.json",
        prompts=read_prompts(folder / "prompts.jsonl"),
        selection_prompts=read_prompts(folder / "choosing.jsonl"),
        folder=folder / "compared",
        sampling=sampling(samples),
        engine=EngineOptions(max_model_len=512, enforce_eager=True),
    )
    return comparison_run.compare(settings, make_judges, progress)


def tried(data: Line) -> Iterator[Line]:
    """All strengths that were tried, from the plain data of a report: the share with all properties
    and the perplexity on the questions of the selection.
    """
    for candidate in data["choosing"]:
        yield {
            "combination": candidate["combination"],
            "method": candidate["method"],
            "strengths": in_words(candidate["steer"]),
            "all": round(candidate["accuracy"], 3),
            "perplexity": round(candidate["perplexity"], 2),
        }


def lines(report: Any) -> Iterator[Line]:
    """A line per combination and method, with standard errors.

    ``beside`` is the share minus that of the fixed strengths on the same questions and seeds.
    """
    from vllm_steer.evaluation.composition.property_judges import PropertyJudges, property_judges

    judges = PropertyJudges(report.spec, property_judges(report.spec))
    for combination in report.spec.combinations:
        verdicts = {
            result.row.title: judges.has_all(combination, result.row.candidate.name, result.answers)
            for result in report.of(combination)
        }
        for result in report.of(combination):
            beside = _difference(verdicts[result.row.title], verdicts["fixed"])
            figures = {name: of for judge in result.judges.values() for name, of in judge.items()}
            yield {
                "combination": "+".join(combination),
                "seen": result.row.seen,
                "method": result.row.title,
                "strengths": in_words(dict(result.row.candidate.steer)),
                "all": round(result.accuracy.share, 4),
                "all_error": round(result.accuracy.error, 4),
                **{name: round(value, 4) for name, value in beside.items()},
                "shares": {name: round(item.share, 4) for name, item in result.shares.items()},
                "perplexity": round(figures["total_perplexity"], 3),
                "perplexity_error": round(figures["total_perplexity_error"], 3),
                "dist_2": round(figures["dist-2"], 3),
            }


def _difference(own: Verdicts, other: Verdicts) -> dict[str, float]:
    """The share of ``own`` minus that of ``other``, text by text, with its error."""
    pairs = [list(zip(*texts, strict=True)) for texts in zip(own, other, strict=True)]

    def figures(rows: Sequence[Sequence[tuple[bool, bool]]]) -> dict[str, float]:
        return {"beside": mean(mean(float(a) - float(b) for a, b in texts) for texts in rows)}

    return with_errors(figures, pairs)


if __name__ == "__main__":
    main()
