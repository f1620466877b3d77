"""What one peer is asked to measure, as a file that its process reads."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dummy_model import Shape

from peers.checkpoint import shape_named


@dataclass(frozen=True)
class Job:
    """``model`` is a folder with weights of ``shape``, ``steers`` one with steers for it (see
    ``checkpoint.py``)."""

    peer: str
    shape: str
    model: str
    steers: str
    dtype: str
    rank: int
    rows: tuple[int, ...]
    repeats: int
    steps: int

    @property
    def dimensions(self) -> Shape:
        """The shape itself."""
        return shape_named(self.shape)

    def write(self, path: Path) -> Path:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> "Job":
        """What ``write`` wrote."""
        given: dict[str, Any] = json.loads(path.read_text())
        return cls(**given | {"rows": tuple(given["rows"])})
