"""Judges by name, as ``--judge`` takes them: ``classifier:MODEL:LABEL``, ``diversity``, ...

A judge that is not available (a model that cannot be loaded, a package that is not installed, a
service that is not offered) is named with the reason. Nothing else ever answers under its name.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeVar

from vllm_steer.errors import SteerError
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
    "the Perspective API is a service on the network whose scores drift; vllm-steer does not call "
    "it. Take a toxicity model of your own: classifier:MODEL:LABEL:continuation"
)


class JudgeNotAtHandError(SteerError):
    """A judge that was asked for rightly and that is not there."""


def make_judge(spec: str, *, device: str | None = None) -> Judge:
    """The judge that a spec asks for, one of ``FORMS``; the spec is its name.

    Models are loaded on the CPU and moved to ``device`` (None: a GPU where there is one) when the
    judge is first asked.

    Raises ``JudgeNotAtHandError`` with the reason, and ``SteerError`` for a misspelt spec, an
    unknown label or language, and a lexicon that cannot be read.
    """
    kind, _, rest = spec.partition(":")
    if kind not in _MAKERS:
        raise _misspelt(spec)
    return _MAKERS[kind](spec, rest, device)


def make_judges(
    specs: Iterable[str], *, device: str | None = None
) -> tuple[list[Judge], dict[str, str]]:
    """The available judges in their order, each once, and for each other spec why it is not.

    Raises ``SteerError`` as ``make_judge`` does for what is wrong rather than missing.
    """
    judges: list[Judge] = []
    missing: dict[str, str] = {}
    for spec in dict.fromkeys(specs):
        try:
            judges.append(make_judge(spec, device=device))
        except JudgeNotAtHandError as error:
            missing[spec] = str(error)
    return judges, missing


def _perplexity(spec: str, model: str, device: str | None) -> Judge:
    from vllm_steer.evaluation.perplexity import PerplexityJudge
    from vllm_steer.models import load_language_model

    if not model:
        raise _misspelt(spec)
    judge = _at_hand(lambda: load_language_model(model, device="cpu"))
    return PerplexityJudge(spec, judge, device)


def _classifier(spec: str, rest: str, device: str | None) -> Judge:
    from vllm_steer.evaluation.classifier import ClassifierJudge, label_place, load_classifier

    name, *options = rest.split(":")
    continuation = options[-1:] == ["continuation"]
    labels = options[:-1] if continuation else options
    if not name or len(labels) > 1:
        raise _misspelt(spec)
    classifier = _at_hand(lambda: load_classifier(name))
    label = label_place(classifier, "".join(labels))
    return ClassifierJudge(spec, classifier, label, continuation, device)


def _language(spec: str, code: str, device: str | None) -> Judge:
    from vllm_steer.evaluation.languages import LanguageJudge, check_code

    if not code:
        raise _misspelt(spec)
    _at_hand(lambda: require_package("langdetect"))
    check_code(code)
    return LanguageJudge(spec, code)


def _lexicon(spec: str, rest: str, device: str | None) -> Judge:
    from vllm_steer.evaluation.lexicons import LexiconJudge, embedded_judge, read_lexicon

    first, colon, about = rest.partition(":")
    if not rest:
        raise _misspelt(spec)
    if first == "embedded":
        return embedded_judge(spec, about)
    return LexiconJudge(spec, read_lexicon(first + colon + about))


def _diversity(spec: str, rest: str, device: str | None) -> Judge:
    from vllm_steer.evaluation.diversity import DiversityJudge

    if spec != "diversity":
        raise _misspelt(spec)
    return DiversityJudge(spec)


def _repetition(spec: str, rest: str, device: str | None) -> Judge:
    from vllm_steer.evaluation.diversity import RepetitionJudge

    if spec != "repetition":
        raise _misspelt(spec)
    return RepetitionJudge(spec)


def _perspective(spec: str, rest: str, device: str | None) -> Judge:
    if spec != "perspective":
        raise _misspelt(spec)
    raise JudgeNotAtHandError(_PERSPECTIVE)


def _at_hand(load: Callable[[], T]) -> T:
    try:
        return load()
    except SteerError as error:
        raise JudgeNotAtHandError(str(error)) from error


def _misspelt(spec: str) -> SteerError:
    return SteerError(f"judge {spec!r} is unknown; judges are given as {', '.join(FORMS)}")


_MAKERS: Final[Mapping[str, Callable[[str, str, str | None], Judge]]] = {
    "perplexity": _perplexity,
    "diversity": _diversity,
    "repetition": _repetition,
    "classifier": _classifier,
    "language": _language,
    "lexicon": _lexicon,
    "perspective": _perspective,
}
