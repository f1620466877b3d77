"""Runs a comparison: select strengths, generate, judge, report. Every stage can be resumed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from vllm_steer.errors import SteerError
from vllm_steer.evaluation.answers import Judge, num_texts
from vllm_steer.evaluation.composition.candidates import (
    Candidate,
    Part,
    make_candidate,
    skip_reason,
)
from vllm_steer.evaluation.composition.dppl import PromptPair, read_icl
from vllm_steer.evaluation.composition.measurement import (
    ComparisonRow,
    RowResult,
    examples_candidate,
    measure,
    read_references,
)
from vllm_steer.evaluation.composition.property_judges import PropertyJudges, property_judges, share
from vllm_steer.evaluation.composition.report import BEST_FIXED, ComparisonReport, markdown
from vllm_steer.evaluation.composition.selection import (
    SelectedStrengths,
    SelectionScores,
    StrengthSelection,
)
from vllm_steer.evaluation.composition.settings import (
    ComparisonSettings,
    check_doses,
    comparison_metadata,
)
from vllm_steer.evaluation.composition.spec import Combination, ComparisonSpec
from vllm_steer.evaluation.dose_options import load_conditions
from vllm_steer.evaluation.evaluation_run import MakeJudges
from vllm_steer.evaluation.json_files import write_json
from vllm_steer.evaluation.missing_texts import (
    GenerationTask,
    Progress,
    ProgressCallback,
    no_progress,
    write_missing,
)
from vllm_steer.evaluation.report import PERPLEXITY
from vllm_steer.evaluation.run import Run, open_run
from vllm_steer.evaluation.sampling import Sampling
from vllm_steer.evaluation.scores import figures_of
from vllm_steer.evaluation.timings import Timings
from vllm_steer.files import load_steer
from vllm_steer.files.atomic_write import write_text
from vllm_steer.models import load_language_model
from vllm_steer.run_folder import locked
from vllm_steer.steers import Steer


def compare(
    settings: ComparisonSettings, make_judges: MakeJudges, progress: Progress = no_progress
) -> ComparisonReport:
    """Run or resume a comparison and write its report into the run folder.

    No engine runs while judges score texts, and existing texts are not generated again.
    ``make_judges`` maps judge specifications to judges and the reasons of unavailable ones;
    ``progress`` reports the stages. Raises ``SteerError`` for an invalid specification, steer,
    judge or run folder.
    """
    if not settings.tolerance >= 0:
        raise SteerError(
            f"tolerance is {settings.tolerance}; expected a share of the texts, 0 to 1"
        )
    spec = ComparisonSpec.load(settings.file)
    steers = {name: load_steer(candidate.steer) for name, candidate in spec.properties.items()}
    conditions = load_conditions(spec.conditions, taken=spec.properties)
    check_doses(spec, steers, conditions)
    examples = {
        combination: read_icl(path, spec.demonstrations, spec.instruction)
        for combination, path in spec.examples.items()
    }
    properties = PropertyJudges(spec, property_judges(spec))
    judges, missing = make_judges(settings.specs)
    perplexity = _perplexity(judges, missing)
    metadata = comparison_metadata(settings, spec, steers, conditions)
    with locked(settings.folder):
        run = open_run(settings.folder, metadata, restart=settings.restart)
        writer = _TextGenerator(settings, spec, examples, run, progress)
        part: Part = "test" if settings.selection_prompts is None else "choosing"
        selected = _select_strengths(
            StrengthSelection(spec, steers, settings.tolerance, part),
            writer,
            properties,
            perplexity,
        )
        rows = list(_rows(spec, steers, selected))
        writer.write(_candidates_to_write(rows, examples))
        with writer.timings.judging():
            all_steers = {**steers, **conditions}
            results = _measure(
                settings, rows, run, properties, judges, examples, all_steers, progress
            )
        report = ComparisonReport(
            metadata,
            spec,
            steers,
            selected,
            results,
            _missing_rows(spec, steers),
            missing,
            writer.timings,
        )
        _write_report(run, report)
    return report


@dataclass(frozen=True)
class _TextGenerator:
    """Generates the texts of candidates into the run folder, and counts them in ``timings``.

    Texts of the part ``examples`` are generated greedily from the plain prompts, one text each:
    dPPL needs only their strengths.
    """

    settings: ComparisonSettings
    spec: ComparisonSpec
    examples: Mapping[Combination, Sequence[PromptPair]]
    run: Run
    progress: Progress
    timings: Timings = field(default_factory=Timings)

    def write(self, candidates: Iterable[Candidate]) -> None:
        """Generate the texts that are missing."""
        texts = list(map(self.task, candidates))
        files = {name: prop.steer.resolve() for name, prop in self.spec.properties.items()}
        files |= {name: path.resolve() for name, path in self.spec.conditions.items()}
        write_missing(
            self.run,
            texts,
            self.settings.model,
            files,
            self.settings.engine,
            self.progress,
            self.timings,
        )

    def task(self, candidate: Candidate) -> GenerationTask:
        """The texts of a candidate, as they are generated."""
        prompts, sampling = self.settings.prompts.texts, self.settings.sampling
        if candidate.part == "examples":
            prompts = tuple(example.plain for example in self.examples[candidate.combination])
            sampling = Sampling(samples=1, max_tokens=sampling.max_tokens, temperature=0, top_k=0)
        elif candidate.part == "choosing" and self.settings.selection_prompts is not None:
            prompts = self.settings.selection_prompts.texts
        return GenerationTask(candidate, prompts, sampling, candidate.steer or None)


def _select_strengths(
    selection: StrengthSelection,
    writer: _TextGenerator,
    properties: PropertyJudges,
    perplexity: Judge,
) -> SelectedStrengths:
    candidates = selection.candidates
    writer.write(candidates)
    measurements: list[tuple[Candidate, SelectionScores]] = []
    total = sum(writer.task(candidate).count for candidate in candidates)
    with writer.progress("choosing", total) as advance, writer.timings.judging():
        done = 0
        for candidate in candidates:
            answers = writer.run.read(candidate)
            verdicts = properties.has_all(candidate.combination, candidate.name, answers)
            figures = figures_of(perplexity, answers, partial(_advance_from, advance, done))
            measurements.append((candidate, SelectionScores(share(verdicts), figures[PERPLEXITY])))
            done += num_texts(answers)
            advance(done)
    return selection.select(measurements)


def _advance_from(advance: ProgressCallback, done: int, count: int) -> None:
    advance(done + count)


def _rows(
    spec: ComparisonSpec, steers: Mapping[str, Steer], selected: SelectedStrengths
) -> Iterator[ComparisonRow]:
    """The rows of each combination in the order of the methods, then the best fixed strengths."""
    for combination in spec.combinations:
        seen = combination in spec.seen
        for method, choice in selected.methods.items():
            if skip_reason(method, combination, spec, steers) is None:
                yield ComparisonRow(method, make_candidate("test", combination, choice), seen)
        if combination in selected.best_fixed:
            yield ComparisonRow(
                BEST_FIXED,
                make_candidate("test", combination, selected.best_fixed[combination]),
                seen,
            )


def _candidates_to_write(
    rows: Sequence[ComparisonRow], examples: Mapping[Combination, Sequence[PromptPair]]
) -> Iterator[Candidate]:
    for row in rows:
        yield row.candidate
        if row.candidate.method == "dynamic" and row.candidate.combination in examples:
            yield examples_candidate(row.candidate)


def _measure(
    settings: ComparisonSettings,
    rows: Sequence[ComparisonRow],
    run: Run,
    properties: PropertyJudges,
    judges: Sequence[Judge],
    examples: Mapping[Combination, Sequence[PromptPair]],
    steers: Mapping[str, Steer],
    progress: Progress,
) -> list[RowResult]:
    references = {}
    if examples:
        language = load_language_model(settings.model)
        references = read_references(language, examples, properties, settings.sampling.max_tokens)
    results: list[RowResult] = []
    # Each row has the texts of all prompts, and each judge reads them.
    texts = len(settings.prompts.texts) * settings.sampling.samples * len(judges)
    with progress("judging", texts * len(rows)) as advance:
        for row in rows:
            done = texts * len(results)
            advance(done, description=row.candidate.name)
            reference = references.get(row.candidate.combination)
            on_text = partial(_advance_from, advance, done)
            results.append(measure(row, run, properties, judges, reference, steers, on_text))
    return results


def _missing_rows(
    spec: ComparisonSpec, steers: Mapping[str, Steer]
) -> list[tuple[Combination, str, str]]:
    """Combination, method and reason of each row that the report does not have."""
    return [
        (combination, method, reason)
        for combination in spec.combinations
        for method in spec.methods
        if (reason := skip_reason(method, combination, spec, steers)) is not None
    ]


def _write_report(run: Run, report: ComparisonReport) -> None:
    write_json(run.folder / "report.json", report.data)
    write_json(run.folder / "strengths.json", report.strengths)
    write_text(run.folder / "report.md", markdown(report))


def _perplexity(judges: Sequence[Judge], missing: Mapping[str, str]) -> Judge:
    for judge in judges:
        if judge.name.partition(":")[0] == "perplexity":
            return judge
    reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
    raise SteerError(f"no perplexity judge is available ({reasons}); give another one")
