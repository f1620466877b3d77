"""Prompts from a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_steer.digest import file_digest
from vllm_steer.errors import SteerError
from vllm_steer.texts import read_rows, take, text_of


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file, in its order, with the file's name and SHA-256."""

    texts: tuple[str, ...]
    file: str
    sha256: str

    @property
    def settings(self) -> dict[str, Any]:
        """File name, digest and number of prompts, for the settings of a run."""
        return {"file": self.file, "sha256": self.sha256, "count": len(self.texts)}


def read_prompts(path: str | Path, *, field: str = "prompt", count: int | None = None) -> Prompts:
    """Read prompts: the ``field`` of each row, a string or ``{"text": ...}``; in ``.txt`` one per
    line.

    ``count`` limits their number. Raises ``SteerError`` with each invalid row, for a file without
    rows and for a count below 1.
    """
    path = Path(path)
    if count is not None and count < 1:
        raise SteerError(f"the number of prompts is {count}; expected at least 1")
    name = "text" if path.suffix == ".txt" else field
    texts = []
    for text in take(read_rows(path), lambda row: text_of(row, name)):
        texts.append(text)
        if len(texts) == count:
            break
    if not texts:
        raise SteerError(f"{path}: the file has no prompts")
    return Prompts(tuple(texts), path.name, file_digest(path))
