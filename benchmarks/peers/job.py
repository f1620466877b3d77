"""What one peer is asked to measure, and its lines: steered over unsteered, and over ours."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import Engine, Leg, compare, step_columns, step_ms
from benchmarks.dummy_model import ALL_SHAPES, Shape, steer_config
from benchmarks.engines import make_engine
from benchmarks.equality import check_engine, check_legs
from benchmarks.rounds import Round, spread

KEYS = (
    "name",
    "shape",
    "rows",
    "distinct",
    "rank",
    "software",
    "unsteered_ms",
    "steered_ms",
    "ratio_median",
    "ratio_p20",
    "ratio_p80",
    "rounds",
    "tokens_per_s",
    "over_ours_median",
    "over_ours_p20",
    "over_ours_p80",
    "skipped",
)
Asked = tuple[Any, str]  # an engine, and the steer that each row of it asks for


@dataclass(frozen=True)
class Job:
    """``model`` is a folder with weights of ``shape``, ``steers`` one with steers for it."""

    peer: str
    shape: str
    model: Path
    steers: Path
    dtype: str
    rank: int
    rows: Sequence[int]
    repeats: int
    steps: int

    @property
    def dimensions(self) -> Shape:
        """The shape itself."""
        return ALL_SHAPES[self.shape]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The model's."""
        return getattr(torch, self.dtype)

    def engine(self, steers: Sequence[str] = (), **options: Any) -> Engine:
        """With vllm-steer and these steers; without any it is stock vLLM, to be made first."""
        paths = {name: self.steers / f"{name}.safetensors" for name in steers}
        config = steer_config(paths, self.rank) if steers else None
        options |= {"dtype": self.dtype, "max_num_seqs": max(self.rows)}
        llm = make_engine(self.model, config, plugin=bool(steers), gpu_memory=0.4, **options)
        return Engine(llm)

    def ours(self, name: str, ours: Asked, rows: int, rank: int = 0) -> dict[str, Any]:
        """vllm-steer's steered legs over its unsteered ones; then each row is seen to be
        steered.
        """
        within = self._rounds((ours[0], None), ours, rows)
        check_engine(ours[0], [ours[1]] * rows, self.dimensions)
        return self.line(name, "vllm", within, rank=rank)

    def beside(
        self, name: str, software: str, ours: Asked, peer: Asked, rows: int, rank: int = 0
    ) -> dict[str, Any]:
        """The peer's steered legs over its unsteered ones, and over vllm-steer's steered ones."""
        within = self._rounds((peer[0], None), peer, rows)
        across = self._rounds(ours, peer, rows)
        check_engine(peer[0], [peer[1]] * rows, self.dimensions)
        return self.line(name, software, within, across, rank=rank)

    def _rounds(self, plain: tuple[Any, str | None], other: Asked, rows: int) -> list[Round[Leg]]:
        asked = [(engine, [steer] * rows) for engine, steer in (plain, other)]
        rounds = compare(*asked, self.steps, self.dimensions.vocab_size, self.repeats)
        check_legs(rounds, steered=True)
        return rounds

    def line(
        self,
        name: str,
        software: str,
        within: Sequence[Round[Leg]],
        across: Sequence[Round[Leg]] = (),
        *,
        rank: int = 0,
    ) -> dict[str, Any]:
        """A measured case."""
        columns, rows = step_columns(within), len(within[0].other.tokens)
        over_ours = [one.ratio(step_ms) for one in across]
        return dict.fromkeys(KEYS) | {
            "name": name,
            "shape": self.shape,
            "rows": rows,
            "distinct": 1,
            "rank": rank,
            "software": f"{software} {importlib.metadata.version(software)}",
            **columns,
            "tokens_per_s": round(1e3 * rows / columns["steered_ms"], 1),
            **(spread("over_ours", over_ours, middle="_median") if over_ours else {}),
        }


def skipped_line(name: str, shape: str, reason: str) -> dict[str, Any]:
    """A peer that was not measured, and why: every figure is None."""
    return dict.fromkeys(KEYS) | {"name": name, "shape": shape, "skipped": reason}
