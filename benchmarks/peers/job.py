"""The job of one peer, and its result lines: steered over unsteered, and over vllm-steer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import BenchmarkEngine, DecodeLeg, compare, step_columns, step_ms
from benchmarks.dummy_model import SHAPES, ModelShape, steer_config
from benchmarks.engines import make_engine
from benchmarks.equality import check_engine, check_legs
from benchmarks.rounds import Round, spread

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # tolerance of a token's log probability
SteeredEngine = tuple[Any, str]  # an engine, and the steer that each of its rows requests


@dataclass(frozen=True)
class PeerJob:
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
    def dimensions(self) -> ModelShape:
        """The model shape."""
        return SHAPES[self.shape]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the model."""
        return getattr(torch, self.dtype)

    def engine(self, steers: Sequence[str] = (), **options: Any) -> BenchmarkEngine:
        """An engine with vllm-steer and these steers; without steers stock vLLM, which must be made
        first.
        """
        paths = {name: self.steers / f"{name}.safetensors" for name in steers}
        config = steer_config(paths, self.rank) if steers else None
        options |= {"dtype": self.dtype, "max_num_seqs": max(self.rows)}
        llm = make_engine(self.model, config, plugin=bool(steers), gpu_memory=0.4, **options)
        return BenchmarkEngine(llm)

    def alone(self, name: str, steered: SteeredEngine, rows: int, rank: int = 0) -> dict[str, Any]:
        """Compare an engine's steered and unsteered legs; then check that each row is steered."""
        within = self._rounds((steered[0], None), steered, rows)
        check_engine(steered[0], [steered[1]] * rows, self.dimensions)
        return self.line(name, within, rank=rank)

    def beside(
        self, name: str, ours: SteeredEngine, peer: SteeredEngine, rows: int, rank: int = 0
    ) -> dict[str, Any]:
        """Compare the peer's steered legs with its unsteered ones, and with vllm-steer's steered
        ones.
        """
        across = self._rounds(ours, peer, rows)
        line = self.alone(name, peer, rows, rank)
        over_ours = [one.ratio(step_ms) for one in across]
        return line | spread("over_ours", over_ours, middle="_median")

    def both(
        self, name: str, ours: SteeredEngine, peer: SteeredEngine, rank: int = 0
    ) -> list[dict[str, Any]]:
        """The lines of vllm-steer and a peer at each batch size."""
        lines = []
        for rows in self.rows:
            lines.append(self.alone(name, ours, rows, rank))
            lines.append(self.beside(self.peer, ours, peer, rows, rank))
        return lines

    def _rounds(
        self, plain: tuple[Any, str | None], other: SteeredEngine, rows: int
    ) -> list[Round[DecodeLeg]]:
        sides = [(engine, [steer] * rows) for engine, steer in (plain, other)]
        rounds = compare(*sides, self.steps, self.dimensions.vocab_size, self.repeats)
        check_legs(rounds, steered=True)
        return rounds

    def line(
        self, name: str, rounds: Sequence[Round[DecodeLeg]], *, rank: int = 0
    ) -> dict[str, Any]:
        """The line of a measured case."""
        columns, rows = step_columns(rounds), len(rounds[0].other.tokens)
        line = {"name": name, "shape": self.shape, "rows": rows, "rank": rank, **columns}
        return line | {"tokens_per_s": round(1e3 * rows / columns["steered_ms"], 1)}
