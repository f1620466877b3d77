"""French answers by the authors' delta: fixed, scheduled and dynamic strengths, one property.

    python -m benchmarks.real_model.french --data DIR --json OUT

The experiment of Scalena et al. (BlackboxNLP 2024, sections 4 and 5.1) on a small model: a delta
between answers after French and after English demonstrations, and the questions without any. The
delta comes from questions that the evaluation does not ask. Each row of the result is one setting
of the strength: the share of French answers (langdetect), their perplexity and variety, and dPPL as
the authors define it, each with its standard error over the questions.
"""

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.engines import set_environment
from benchmarks.real_model.experiment import (
    jackknife,
    language_model,
    parser,
    seconds_of,
    steer_file,
    timed,
)
from benchmarks.real_model.french_figures import Observation, Setting, figures, saved, settings
from benchmarks.real_model.tables import real_model
from benchmarks.result import Result
from vllm_steer.evaluation.means import mean

DEMONSTRATIONS: Final = 4
INSTRUCTIONS: Final = {
    "FRA": "Répondre aux questions suivantes",
    "ENG": "Answer the following questions",
}
QUESTIONS: Final = 50
SUPPORT: Final = 30
TOKENS: Final = 30


def main() -> None:
    """Fit, generate, judge, write, print."""
    set_environment()
    options = parser(__doc__, "french")
    options.add_argument("--samples", type=int, default=5, help="texts per question")
    args = options.parse_args()
    result = Result(
        "real_model_french",
        args.json,
        model=Path(args.model).name,
        questions=QUESTIONS,
        samples=args.samples,
        max_tokens=TOKENS,
        support=SUPPORT,
        demonstrations=DEMONSTRATIONS,
    )
    measured = Measurement(args.model, args.data / "dac", args.folder, args.samples)
    measured.folder.mkdir(parents=True, exist_ok=True)
    with timed(measured.folder, "fit and generate"):
        measured.prepare()
    with timed(measured.folder, "judge"):
        observations = measured.observations()
    for setting in settings():
        result.add(figures(setting, observations[setting.name]))
    result.write(
        demonstrations_figures=measured.demonstrations_figures(),
        saved=list(saved(observations)),
        curves=measured.curves(),
        seconds=seconds_of(measured.folder),
    )
    print(real_model(result.data))


def sampling(samples: int) -> Any:
    """Top-k alone: top-p sorts the vocabulary, which takes longer on a CPU than the model."""
    from vllm_steer.evaluation.sampling import Sampling

    return Sampling(samples=samples, max_tokens=TOKENS, temperature=0.7, top_k=50)


@dataclass(frozen=True)
class Measurement:
    """The experiment's files: the delta, its control, the texts, and what was judged so far."""

    model: str
    data: Path
    folder: Path
    samples: int

    def prepare(self) -> None:
        """Fit the delta and generate all texts that the folder lacks."""
        from vllm_steer.cli.progress import progress
        from vllm_steer.evaluation.control import random_steer
        from vllm_steer.evaluation.generation import EngineOptions
        from vllm_steer.evaluation.missing_texts import GenerationTask, write_missing
        from vllm_steer.evaluation.timings import Timings
        from vllm_steer.files import load_steer, save_steer

        if not self.steer_files["fr"].exists():
            save_steer(fit_french(self.model, self.data), self.steer_files["fr"])
        if not self.steer_files["random"].exists():
            control = random_steer(load_steer(self.steer_files["fr"]), 0)
            save_steer(control, self.steer_files["random"])
        questions = [pair.plain for pair in self.pairs]
        tasks = [
            GenerationTask(row, questions, self.sampling(greedy=row.greedy), row.steer or None)
            for row in self.text_sets
        ]
        options = EngineOptions(max_model_len=512, enforce_eager=True)
        timings = Timings()
        write_missing(self.run(), tasks, self.model, self.steer_files, options, progress, timings)

    @property
    def steer_files(self) -> dict[str, Path]:
        return {name: (self.folder / f"{name}.safetensors").absolute() for name in ("fr", "random")}

    @property
    def text_sets(self) -> list[Setting]:
        """Sampled texts, and the greedy ones that dPPL takes dynamic strengths from."""
        return [
            Setting(row.method, row.title, row.steer, greedy)
            for row in settings()
            for greedy in (False, True)
        ]

    @property
    def pairs(self) -> list[Any]:
        """The questions, with French demonstrations and without any."""
        from vllm_steer.evaluation.composition.dppl import read_icl

        return read_icl(self.data / "FRA.json", DEMONSTRATIONS, INSTRUCTIONS["FRA"])[:QUESTIONS]

    def sampling(self, *, greedy: bool) -> Any:
        from vllm_steer.evaluation.sampling import Sampling

        if greedy:
            return Sampling(samples=1, max_tokens=TOKENS, temperature=0, top_k=0)
        return sampling(self.samples)

    def run(self) -> Any:
        """The run folder of the texts; texts made under other settings are an error."""
        from vllm_steer.digest import file_digest
        from vllm_steer.evaluation.run import open_run

        return open_run(
            self.folder / "texts",
            {
                "model": self.model,
                "steers": {name: file_digest(path) for name, path in self.steer_files.items()},
                "sampling": self.sampling(greedy=False).settings,
                "questions": QUESTIONS,
            },
        )

    def observations(self) -> dict[str, list[Observation]]:
        """All measurements, by setting and question; finished settings are read from the folder."""
        from vllm_steer.cli.progress import progress

        rows = settings()
        measured = {}
        with progress("judging", len(rows)) as advance:
            for done, row in enumerate(rows):
                advance(done, description=f"judging {row.method} {row.title}")
                path = self.folder / "judged" / f"{row.name}.json"
                if not path.exists():
                    self._judge(row, path)
                lines = json.loads(path.read_text(encoding="utf-8"))
                measured[row.name] = [
                    Observation(**line, log_ratio=_log_ratio(line["dppl"], gold["perplexity"]))
                    for line, gold in zip(lines, self.golds(), strict=True)
                ]
        return measured

    def _judge(self, setting: Setting, path: Path) -> None:
        from vllm_steer.evaluation.diversity import DiversityJudge
        from vllm_steer.evaluation.languages import LanguageJudge
        from vllm_steer.evaluation.perplexity import likelihoods
        from vllm_steer.files.atomic_write import write_text

        french, diversity = LanguageJudge("fr", "fr"), DiversityJudge("diversity")
        answers = self.run().read(setting)
        greedy_set = Setting(setting.method, setting.title, setting.steer, greedy=True)
        greedy = self.run().read(greedy_set)
        costs = iter(likelihoods(self.language, answers))
        lines = []
        for answer, greedy_answer, pair, gold in zip(
            answers, greedy, self.pairs, self.golds(), strict=True
        ):
            own = [next(costs) for _ in answer.texts]
            scores = french.scores([answer])
            line = Observation(
                share=scores["share"],
                probability=scores["probability"],
                nll=sum(cost.nll for cost in own if cost.num_tokens),
                tokens=sum(cost.num_tokens for cost in own),
                dist_2=diversity.scores([answer])["dist-2"],
                greedy_share=french.scores([greedy_answer])["share"],
                dppl=self._dppl(setting, pair, gold, greedy_answer),
            )
            lines.append(
                {name: value for name, value in asdict(line).items() if name != "log_ratio"}
            )
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps(lines))

    def _dppl(self, setting: Setting, pair: Any, gold: dict[str, Any], greedy: Any) -> float | None:
        """dPPL of one question, None if its answer after demonstrations is not French."""
        from vllm_steer.evaluation.composition.dppl import GoldAnswer, steered_perplexity

        if not gold["french"]:
            return None
        answer = GoldAnswer(tuple(gold["tokens"]), gold["text"], gold["perplexity"])
        strengths = greedy.strengths[0] if greedy.strengths else None
        steered = steered_perplexity(
            self.language, pair, answer, setting.steer, self.steers, strengths
        )
        return steered - answer.perplexity if steered == steered else None

    def golds(self) -> list[dict[str, Any]]:
        """The model's greedy answers after French demonstrations, made once."""
        path = self.folder / "demonstrations.json"
        if not path.exists():
            self._write_golds(path)
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return rows

    def _write_golds(self, path: Path) -> None:
        from vllm_steer.cli.progress import progress
        from vllm_steer.evaluation.answers import Answers
        from vllm_steer.evaluation.composition.dppl import gold_answer
        from vllm_steer.evaluation.languages import LanguageJudge
        from vllm_steer.files.atomic_write import write_text

        rows = []
        with progress("answers after demonstrations", len(self.pairs)) as advance:
            for pair in self.pairs:
                gold = gold_answer(self.language, pair, TOKENS)
                verdict = LanguageJudge("fr", "fr").scores([Answers(pair.plain, (gold.text,))])
                rows.append(asdict(gold) | {"french": bool(verdict["share"])})
                advance(len(rows))
        write_text(path, json.dumps(rows, ensure_ascii=False))

    def demonstrations_figures(self) -> dict[str, Any]:
        """Share of French and mean perplexity of the answers after demonstrations."""
        golds = self.golds()
        value, error = jackknife(
            golds, lambda rows: statistics.fmean(row["french"] for row in rows)
        )
        french = [row["perplexity"] for row in golds if row["french"]]
        return {
            "share": round(value, 4),
            "share_error": round(error, 4),
            "perplexity": round(mean(french), 4),
            "french": len(french),
        }

    def curves(self) -> dict[str, Any]:
        """Mean and quartiles of each dynamic strength over the tokens of the sampled texts."""
        from vllm_steer.evaluation.composition.curves import dynamic_curves

        lines = {}
        for row in settings():
            for curve in dynamic_curves(self.run().read(row)).values():
                parts = {name: getattr(curve, name) for name in ("mean", "lower", "upper")}
                lines[f"{row.method} {row.title}"] = {
                    name: [round(value, 3) for value in values] for name, values in parts.items()
                }
        return lines

    @property
    def language(self) -> Any:
        return language_model(self.model)

    @property
    def steers(self) -> dict[str, Any]:
        return {name: steer_file(path) for name, path in self.steer_files.items()}


def _log_ratio(dppl: float | None, demonstrations: float) -> float | None:
    return None if dppl is None else math.log((demonstrations + dppl) / demonstrations)


def fit_french(model: str, data: Path) -> Any:
    """The delta: French answers minus English ones, on the questions after the first 50."""
    from vllm_steer.cli.progress import progress
    from vllm_steer.fit import fit_delta
    from vllm_steer.texts.icl import icl_prompts, read_examples, support

    sides = [
        icl_prompts(
            read_examples(data / f"{language}.json"), DEMONSTRATIONS, instruction=instruction
        )[QUESTIONS:]
        for language, instruction in INSTRUCTIONS.items()
    ]
    wanted, other = support(*sides, SUPPORT, 32)
    language = language_model(model)
    with progress("fitting the delta", 2 * SUPPORT) as advance:
        return fit_delta(
            language.model, language.tokenizer, wanted, other, steps=TOKENS, on_prompt=advance
        )


if __name__ == "__main__":
    main()
