"""Runs a comparison: select, generate, judge, report; each part resumes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vllm_steer.errors import SteerError
from vllm_steer.evaluation.answers import Judge
from vllm_steer.evaluation.composition.asked import Combination, Composition
from vllm_steer.evaluation.composition.candidates import (
    Candidate,
    Part,
    candidate,
    why_not,
)
from vllm_steer.evaluation.composition.choosing import Choosing, Chosen, Figures
from vllm_steer.evaluation.composition.comparison import (
    Comparison,
    about_comparison,
    check_doses,
)
from vllm_steer.evaluation.composition.dppl import Example, read_icl
from vllm_steer.evaluation.composition.judging import PropertyJudges, property_judges, share
from vllm_steer.evaluation.composition.measuring import (
    Measured,
    Row,
    free_candidate,
    measure,
    read_golds,
)
from vllm_steer.evaluation.composition.report import BEST, ComparisonReport, markdown
from vllm_steer.evaluation.evaluating import MakeJudges
from vllm_steer.evaluation.json_files import write_json
from vllm_steer.evaluation.report import PERPLEXITY
from vllm_steer.evaluation.run import Run, open_run
from vllm_steer.evaluation.sampling import Sampling
from vllm_steer.evaluation.writing import Progress, Texts, write_missing
from vllm_steer.files import load_steer
from vllm_steer.files.atomic_write import write_text
from vllm_steer.models import load_language_model
from vllm_steer.run_folder import locked
from vllm_steer.steers import Steer


def compare(given: Comparison, make_judges: MakeJudges, progress: Progress) -> ComparisonReport:
    """Run a comparison, or the rest of it, and write its report into the run's folder.

    The engine is gone whenever judges are asked; texts that are finished in the folder are not
    generated again. Raises ``SteerError`` for a file, a steer, a judge or a folder that cannot be.
    """
    if not given.tolerance >= 0:
        raise SteerError(f"tolerance is {given.tolerance}; expected a share of the texts, 0 to 1")
    asked = Composition.load(given.file)
    steers = {name: load_steer(each.steer) for name, each in asked.properties.items()}
    check_doses(asked, steers)
    examples = {
        combination: read_icl(path, asked.demonstrations, asked.instruction)
        for combination, path in asked.examples.items()
    }
    properties = PropertyJudges(asked, property_judges(asked))
    judges, missing = make_judges(given.specs)
    perplexity = _perplexity(judges, missing)
    about = about_comparison(given, asked, steers)
    with locked(given.folder):
        run = open_run(given.folder, about, restart=given.restart)
        writer = _Writer(given, asked, examples, run, progress)
        part: Part = "test" if given.choosing is None else "choosing"
        chosen = _choose(
            Choosing(asked, steers, given.tolerance, part), writer, properties, perplexity
        )
        rows = list(_rows(asked, steers, chosen))
        writer.write(_to_write(rows, examples))
        measured = _measure(given, rows, run, properties, judges, examples, steers, progress)
        absences = _absences(asked, steers)
        report = ComparisonReport(about, asked, steers, chosen, measured, absences, missing)
        _write_report(run, report)
    return report


@dataclass(frozen=True)
class _Writer:
    """Writes the texts of candidates into the run's folder.

    Those of the part ``examples`` are written greedily after the examples' plain prompts, one text
    each: dPPL needs their strengths only.
    """

    given: Comparison
    asked: Composition
    examples: Mapping[Combination, Sequence[Example]]
    run: Run
    progress: Progress

    def write(self, wanted: Iterable[Candidate]) -> None:
        """Generate the texts that are not there yet."""
        texts = list(map(self._texts, wanted))
        files = {name: each.steer.resolve() for name, each in self.asked.properties.items()}
        write_missing(self.run, texts, self.given.model, files, self.given.engine, self.progress)

    def _texts(self, each: Candidate) -> Texts:
        prompts, sampling = self.given.prompts.texts, self.given.sampling
        if each.part == "examples":
            prompts = tuple(example.plain for example in self.examples[each.combination])
            sampling = Sampling(samples=1, max_tokens=sampling.max_tokens, temperature=0, top_k=0)
        elif each.part == "choosing" and self.given.choosing is not None:
            prompts = self.given.choosing.texts
        return Texts(each, prompts, sampling, each.steer or None)


def _choose(
    choosing: Choosing, writer: _Writer, properties: PropertyJudges, perplexity: Judge
) -> Chosen:
    wanted = choosing.candidates
    writer.write(wanted)
    tried: list[tuple[Candidate, Figures]] = []
    with writer.progress("choosing", len(wanted)) as advance:
        for each in wanted:
            answers = writer.run.read(each)
            told = properties.has_all(each.combination, each.name, answers)
            tried.append((each, Figures(share(told), perplexity.scores(answers)[PERPLEXITY])))
            advance(len(tried))
    return choosing.chosen(tried)


def _rows(asked: Composition, steers: Mapping[str, Steer], chosen: Chosen) -> Iterator[Row]:
    """The rows of each combination in the order of the methods, the best fixed one after them."""
    for combination in asked.combinations:
        seen = combination in asked.seen
        for method, choice in chosen.methods.items():
            if why_not(method, combination, asked, steers) is None:
                yield Row(method, candidate("test", combination, choice), seen)
        if combination in chosen.best:
            yield Row(BEST, candidate("test", combination, chosen.best[combination]), seen)


def _to_write(
    rows: Sequence[Row], examples: Mapping[Combination, Sequence[Example]]
) -> Iterator[Candidate]:
    for row in rows:
        yield row.candidate
        if row.candidate.method == "dynamic" and row.candidate.combination in examples:
            yield free_candidate(row.candidate)


def _measure(
    given: Comparison,
    rows: Sequence[Row],
    run: Run,
    properties: PropertyJudges,
    judges: Sequence[Judge],
    examples: Mapping[Combination, Sequence[Example]],
    steers: Mapping[str, Steer],
    progress: Progress,
) -> list[Measured]:
    readings = {}
    if examples:
        language = load_language_model(given.model)
        readings = read_golds(language, examples, properties, given.sampling.max_tokens)
    found: list[Measured] = []
    with progress("judging", len(rows)) as advance:
        for row in rows:
            reading = readings.get(row.candidate.combination)
            found.append(measure(row, run, properties, judges, reading, steers))
            advance(len(found), said=row.candidate.name)
    return found


def _absences(
    asked: Composition, steers: Mapping[str, Steer]
) -> list[tuple[Combination, str, str]]:
    """Combination, method and reason of each row that there is not."""
    return [
        (combination, method, reason)
        for combination in asked.combinations
        for method in asked.methods
        if (reason := why_not(method, combination, asked, steers)) is not None
    ]


def _write_report(run: Run, report: ComparisonReport) -> None:
    write_json(run.folder / "report.json", report.data)
    write_json(run.folder / "strengths.json", report.strengths)
    write_text(run.folder / "report.md", markdown(report))


def _perplexity(judges: Sequence[Judge], missing: Mapping[str, str]) -> Judge:
    for judge in judges:
        if judge.name.startswith("perplexity:"):
            return judge
    reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
    raise SteerError(f"no judge of perplexity is available ({reasons})")
