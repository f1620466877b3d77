"""Judges by specification, as for ``--judge``: ``classifier:MODEL:LABEL``, ``diversity``, ...

An unavailable judge (missing model, package or service) is reported with the reason and is never
replaced by another one.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeVar

from vllm_steer.errors import JudgeUnavailableError, SteerError
from vllm_steer.evaluation.answers import Judge
from vllm_steer.optional import require_package

T = TypeVar("T")

FORMS: Final = (
    "perplexity:MODEL",
    "diversity",
    "repetition",
    "classifier:MODEL[:LABEL][:continuation]",
    "language:CODE",
    "lexicon:FILE.yaml",
    "lexicon:embedded:sentiment|formality|language=CODE",
    "perspective",
)
_PERSPECTIVE: Final = (
    "the Perspective API is a network service whose scores change over time; vllm-steer does not "
    "call it; use a local toxicity model: classifier:MODEL:LABEL:continuation"
)


def make_judge(spec: str, *, device: str | None = None) -> Judge:
    """The judge of a specification, one of ``FORMS``; the specification is the judge's name.

    Models are loaded on the CPU and move to ``device`` (None: a GPU if there is one) at their first
    use.

    Raises ``JudgeUnavailableError`` if a model, package or service is missing, and ``SteerError``
    for an invalid specification, an unknown label or language, and an invalid lexicon.
    """
    kind, _, argument = spec.partition(":")
    if kind not in _BUILDERS:
        raise _unknown_judge(spec)
    return _BUILDERS[kind](spec, argument, device)


def make_judges(
    specs: Iterable[str], *, device: str | None = None
) -> tuple[list[Judge], dict[str, str]]:
    """The available judges, without duplicates, and the reason for each unavailable specification.

    Raises ``SteerError`` for invalid specifications, as ``make_judge`` does.
    """
    judges: list[Judge] = []
    missing: dict[str, str] = {}
    for spec in dict.fromkeys(specs):
        try:
            judges.append(make_judge(spec, device=device))
        except JudgeUnavailableError as error:
            missing[spec] = str(error)
    return judges, missing


def _perplexity(spec: str, model: str, device: str | None) -> Judge:
    from vllm_steer.evaluation.perplexity import PerplexityJudge
    from vllm_steer.models import load_language_model

    if not model:
        raise _unknown_judge(spec)
    judge = _load_or_unavailable(lambda: load_language_model(model, device="cpu"))
    return PerplexityJudge(spec, judge, device)


def _classifier(spec: str, argument: str, device: str | None) -> Judge:
    from vllm_steer.evaluation.classifier import ClassifierJudge, label_index, load_classifier

    name, *options = argument.split(":")
    continuation = options[-1:] == ["continuation"]
    labels = options[:-1] if continuation else options
    if not name or len(labels) > 1:
        raise _unknown_judge(spec)
    classifier = _load_or_unavailable(lambda: load_classifier(name))
    label = label_index(classifier, "".join(labels))
    return ClassifierJudge(spec, classifier, label, continuation, device)


def _language(spec: str, code: str, device: str | None) -> Judge:
    from vllm_steer.evaluation.languages import LanguageJudge, check_code

    if not code:
        raise _unknown_judge(spec)
    _load_or_unavailable(lambda: require_package("langdetect"))
    check_code(code)
    return LanguageJudge(spec, code)


def _lexicon(spec: str, argument: str, device: str | None) -> Judge:
    from vllm_steer.evaluation.lexicons import LexiconJudge, embedded_judge, read_lexicon

    prefix, colon, lexicon = argument.partition(":")
    if not argument:
        raise _unknown_judge(spec)
    if prefix == "embedded":
        return embedded_judge(spec, lexicon)
    return LexiconJudge(spec, read_lexicon(prefix + colon + lexicon))


def _diversity(spec: str, argument: str, device: str | None) -> Judge:
    from vllm_steer.evaluation.diversity import DiversityJudge

    if spec != "diversity":
        raise _unknown_judge(spec)
    return DiversityJudge(spec)


def _repetition(spec: str, argument: str, device: str | None) -> Judge:
    from vllm_steer.evaluation.diversity import RepetitionJudge

    if spec != "repetition":
        raise _unknown_judge(spec)
    return RepetitionJudge(spec)


def _perspective(spec: str, argument: str, device: str | None) -> Judge:
    if spec != "perspective":
        raise _unknown_judge(spec)
    raise JudgeUnavailableError(_PERSPECTIVE)


def _load_or_unavailable(load: Callable[[], T]) -> T:
    """Call ``load``; a ``SteerError`` becomes a ``JudgeUnavailableError``."""
    try:
        return load()
    except SteerError as error:
        raise JudgeUnavailableError(str(error)) from error


def _unknown_judge(spec: str) -> SteerError:
    return SteerError(f"judge {spec!r} is unknown; available: {', '.join(FORMS)}")


_BUILDERS: Final[Mapping[str, Callable[[str, str, str | None], Judge]]] = {
    "perplexity": _perplexity,
    "diversity": _diversity,
    "repetition": _repetition,
    "classifier": _classifier,
    "language": _language,
    "lexicon": _lexicon,
    "perspective": _perspective,
}
