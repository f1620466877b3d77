"""The folder of a run: what was asked, and the texts of every setting that is finished.

    settings.json              what the texts come from
    random.safetensors         the random control
    generations/NAME.jsonl     one row per prompt, in the LM-Steer authors' form; whole or not there

Killed at any time, a run goes on where it was: a setting whose file is there is finished.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar

from vllm_steer.errors import SteerError
from vllm_steer.evaluation.answers import Answers
from vllm_steer.files.atomic_write import write_text
from vllm_steer.files.json_text import json_text
from vllm_steer.run_folder import SETTINGS, RunFiles, open_with_settings

Which = Literal["none", "steer", "random"]
S = TypeVar("S", bound="Named")
_MADE_BY: Final = "vllm-steer eval"
_GENERATIONS: Final = "generations"
_TEXTS: Final = ".jsonl"
_CONTROL: Final = "random.safetensors"
_FILES: Final = RunFiles(
    (
        f"{_GENERATIONS}/*{_TEXTS}",
        _CONTROL,
        "scores.json",
        "strengths.json",
        "report.json",
        "report.md",
        "report.png",
        "strengths.png",
        SETTINGS,
    )
)


class Named(Protocol):
    """Something that texts are written under: the name of its file, and what its rows say of it."""

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Setting:
    """A steer, the random control or none, at a strength."""

    which: Which
    strength: float

    @property
    def about(self) -> dict[str, Any]:
        """What the rows of its texts say."""
        return {"steer": self.which, "strength": self.strength}

    @property
    def name(self) -> str:
        """Such as ``steer+2.5``; the unsteered model is ``none``."""
        return "none" if self.which == "none" else f"{self.which}{self.strength:+.12g}"


def settings_of(strengths: Sequence[float]) -> list[Setting]:
    """The unsteered model once, then the steer and its control at each other strength."""
    steered = [s for s in strengths if s != 0]
    both: tuple[Which, Which] = ("steer", "random")
    return [Setting("none", 0.0), *(Setting(which, s) for which in both for s in steered)]


@dataclass(frozen=True)
class Run:
    """An open run folder."""

    folder: Path

    @property
    def control(self) -> Path:
        """Where the random steer is kept."""
        return self.folder / _CONTROL

    def missing(self, settings: Sequence[S]) -> list[S]:
        """The settings whose texts are not written yet."""
        return [setting for setting in settings if not self._path(setting).is_file()]

    def write(self, setting: Named, answers: Sequence[Answers]) -> None:
        """Keep the texts of a setting; its file appears whole."""
        rows = (
            {
                "prompt": {"text": answer.prompt},
                "generations": _generations(answer),
                **setting.about,
            }
            for answer in answers
        )
        lines = [json_text(row) + "\n" for row in rows]
        write_text(self._path(setting), "".join(lines))

    def read(self, setting: Named) -> list[Answers]:
        """The texts of a finished setting; ``SteerError`` if its file is not as it was written."""
        path = self._path(setting)
        try:
            with path.open(encoding="utf-8") as file:
                return [_answers(json.loads(line)) for line in file]
        except OSError as error:
            raise SteerError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SteerError(
                f"{path}: not as it was written ({error!r:.100}); delete it to generate it again"
            ) from None

    def _path(self, setting: Named) -> Path:
        return self.folder / _GENERATIONS / f"{setting.name}{_TEXTS}"


def open_run(folder: str | Path, settings: Mapping[str, Any], *, restart: bool = False) -> Run:
    """A new run's folder, or that of an earlier run with the same ``settings`` or without texts.

    ``restart`` discards what an earlier run wrote there, and nothing else. Raises ``SteerError``
    for a folder with other settings, naming them, for one with other things in it, and for one that
    cannot be written.
    """
    folder = Path(folder)
    begun = any((folder / _GENERATIONS).glob(f"*{_TEXTS}"))
    settings = {"made_by": _MADE_BY, **settings}
    open_with_settings(folder, _FILES, settings, begun=begun, restart=restart)
    return Run(folder)


def _generations(answer: Answers) -> list[dict[str, Any]]:
    texts = [{"text": text} for text in answer.texts]
    if not answer.strengths:
        return texts
    both = zip(texts, answer.strengths, strict=True)
    return [{**text, "steer_strengths": dict(strengths)} for text, strengths in both]


def _answers(row: Any) -> Answers:
    generations = row["generations"]
    strengths = [
        {name: tuple(values) for name, values in generation["steer_strengths"].items()}
        for generation in generations
        if "steer_strengths" in generation
    ]
    return Answers(
        row["prompt"]["text"],
        tuple(generation["text"] for generation in generations),
        tuple(strengths),
    )
