"""Run folders: the settings of a run and the texts of each finished condition.

    settings.json              what determines the texts
    random.safetensors         the random control
    generations/NAME.jsonl     one row per prompt, in the format of the LM-Steer authors

Files are written atomically: a condition with a file is finished, and an interrupted run resumes
with the next one.
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

SteerRole = Literal["none", "steer", "random"]
S = TypeVar("S", bound="TextSet")
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


class TextSet(Protocol):
    """A set of texts that is stored under one file name, with metadata for each of its rows."""

    @property
    def name(self) -> str: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Condition:
    """An experimental condition: the steer, the random control or no steer, at a strength."""

    steer: SteerRole
    strength: float

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata in each row of its texts."""
        return {"steer": self.steer, "strength": self.strength}

    @property
    def name(self) -> str:
        """The file name, such as ``steer+2.5``; ``none`` for the unsteered model."""
        return "none" if self.steer == "none" else f"{self.steer}{self.strength:+.12g}"


def condition_grid(strengths: Sequence[float]) -> list[Condition]:
    """The unsteered model once, then the steer and the random control at each nonzero strength."""
    steered = [s for s in strengths if s != 0]
    roles: tuple[SteerRole, SteerRole] = ("steer", "random")
    return [Condition("none", 0.0), *(Condition(steer, s) for steer in roles for s in steered)]


@dataclass(frozen=True)
class Run:
    """An open run folder."""

    folder: Path

    @property
    def control(self) -> Path:
        """Path of the random steer."""
        return self.folder / _CONTROL

    def missing(self, text_sets: Sequence[S]) -> list[S]:
        """The text sets that have not been generated yet."""
        return [text_set for text_set in text_sets if not self._path(text_set).is_file()]

    def write(self, text_set: TextSet, answers: Sequence[Answers]) -> None:
        """Store the texts of a text set atomically."""
        rows = (
            {
                "prompt": {"text": answer.prompt},
                "generations": _generations(answer),
                **text_set.metadata,
            }
            for answer in answers
        )
        lines = [json_text(row) + "\n" for row in rows]
        write_text(self._path(text_set), "".join(lines))

    def read(self, text_set: TextSet) -> list[Answers]:
        """Read the texts of a text set. Raises ``SteerError`` if its file is damaged."""
        path = self._path(text_set)
        try:
            with path.open(encoding="utf-8") as file:
                return [_answers(json.loads(line)) for line in file]
        except OSError as error:
            raise SteerError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SteerError(
                f"{path}: the file is damaged ({error!r:.100}); delete it to generate it again"
            ) from None

    def _path(self, text_set: TextSet) -> Path:
        return self.folder / _GENERATIONS / f"{text_set.name}{_TEXTS}"


def open_run(folder: str | Path, settings: Mapping[str, Any], *, restart: bool = False) -> Run:
    """Open a new run folder, or one of a run with the same ``settings`` or without texts.

    ``restart`` deletes the files of an earlier run, and no others. Raises ``SteerError`` for a
    folder of a run with other settings, with the differences, for a folder with other files, and
    for a folder that cannot be written.
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
    pairs = zip(texts, answer.strengths, strict=True)
    return [{**text, "steer_strengths": dict(strengths)} for text, strengths in pairs]


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
