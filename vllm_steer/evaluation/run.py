"""The folder of a run: what was asked, and the texts of every setting that is finished.

    settings.json              what the texts come from; another run's folder is refused
    random.safetensors         the random control
    generations/NAME.jsonl     one row per prompt, in the LM-Steer authors' form; whole or not there

Killed at any time, a run goes on where it was: a setting whose file is there is finished.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar

from vllm_steer.errors import SteerError
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.json_files import json_text
from vllm_steer.files.folder_lock import LOCK
from vllm_steer.files.source import cause
from vllm_steer.files.whole import clear_unfinished, finished_name, write_text
from vllm_steer.foreign import listed, shown
from vllm_steer.foreign import name as named

Which = Literal["none", "steer", "random"]
S = TypeVar("S", bound="Named")
_SETTINGS: Final = "settings.json"
_MADE_BY: Final = "vllm-steer eval"
_GENERATIONS: Final = "generations"
_OWN: Final = (
    "random.safetensors",
    "scores.json",
    "strengths.json",
    "report.json",
    "report.md",
    "report.png",
    "strengths.png",
)
_TEXTS: Final = ".jsonl"
_SHOWN: Final = 3


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
        return self.folder / "random.safetensors"

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
    path = folder / _SETTINGS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = {"made_by": _MADE_BY, **settings}
        differences = _differences(_found(folder), json.loads(json.dumps(written)))
        begun = any((folder / _GENERATIONS).glob(f"*{_TEXTS}"))
        if path.exists() and (restart or (differences and not begun)):
            _discard(folder)  # without texts there is nothing to lose
        elif differences and path.exists():
            raise SteerError(
                f"{folder}: holds a run with other settings: {'; '.join(differences[:_SHOWN])}; "
                "give another folder, or --restart to discard that run"
            )
        if not path.exists():
            write_text(path, json_text(written, indent=2) + "\n")
        (folder / _GENERATIONS).mkdir(exist_ok=True)
        _clear_unfinished(folder)
    except OSError as error:
        raise SteerError(f"{folder}: cannot be used ({error.strerror})") from error
    return Run(folder)


def _found(folder: Path) -> Any:
    """The settings of the run in a folder, None in an empty one; ``SteerError`` for any other."""
    path = folder / _SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError) as error:
        raise SteerError(f"{path}: no JSON ({cause(error)}); give another folder") from None
    strange = sorted(entry.name for entry in folder.iterdir() if not _in_passing(entry.name))
    if strange and (not isinstance(found, dict) or found.get("made_by") != _MADE_BY):
        raise SteerError(
            f"{folder}: holds {listed(strange[:_SHOWN])} and is no run's folder; give a new "
            "one, or an empty one"
        )
    return found


def _differences(found: Any, asked: Any, place: str = "") -> list[str]:
    """Where two sets of settings differ, in words."""
    if isinstance(found, dict) and isinstance(asked, dict):
        keys = [*asked, *(key for key in found if key not in asked)]
        return [
            difference
            for key in keys
            for difference in _differences(
                found.get(key), asked.get(key), f"{place}.{key}" if place else key
            )
        ]
    return (
        [] if found == asked else [f"{named(place)} was {shown(found)} and is now {shown(asked)}"]
    )


def _clear_unfinished(folder: Path) -> None:
    """Remove what a killed process was writing."""
    clear_unfinished(folder, (*_OWN, _SETTINGS).__contains__)
    clear_unfinished(folder / _GENERATIONS, lambda name: name.endswith(_TEXTS))


def _in_passing(name: str) -> bool:
    """Whether a file is there only while a run writes, or because one was killed."""
    return name == LOCK or finished_name(name) in (*_OWN, _SETTINGS)


def _discard(folder: Path) -> None:
    # The settings last: what is left of a run that was killed here is still a run's folder.
    for path in (folder / _GENERATIONS).glob(f"*{_TEXTS}"):
        path.unlink()
    for name in (*_OWN, _SETTINGS):
        if os.path.lexists(folder / name):
            (folder / name).unlink()


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
