"""The LM head's inputs of a frozen model: computed once and stored on disk, or recomputed.

A model reads texts in batches of about equal length, so that little of a batch is padding. The
padding is on the right, where causal attention never sees it.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import torch

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.atomic_write import write_atomically
from vllm_steer.fit.encoded_texts import EncodedTexts, TextBatch
from vllm_steer.hf.language_model import backbone

FetchHiddenStates = Callable[[TextBatch], torch.Tensor]
"""Of a batch ``[positions, hidden_size]``, text after text, in the model's dtype."""

_WINDOW_TOKENS: Final = 4096


@dataclass(frozen=True)
class HiddenStateFile:
    """A file of hidden states: the first positions of each text, at an offset."""

    path: Path
    counts: Mapping[int, int]
    places: Mapping[int, int]  # in positions
    hidden_size: int
    dtype: torch.dtype

    @property
    def position_bytes(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Size of the whole file."""
        return sum(self.counts.values()) * self.position_bytes


def plan_storage(
    model: Any, batches: Sequence[TextBatch], path: Path, hidden_size: int
) -> HiddenStateFile:
    """Plan the file for these batches: the shortest text first."""
    longest: dict[int, int] = {}
    for batch in batches:
        for row, count in zip(batch.rows, batch.counts, strict=True):
            longest[row] = max(count, longest.get(row, 0))
    counts = dict(sorted(longest.items(), key=lambda item: (item[1], item[0])))
    ends = itertools.accumulate(counts.values(), initial=0)
    return HiddenStateFile(
        path, counts, dict(zip(counts, ends, strict=False)), hidden_size, model.dtype
    )


def write_hidden_states(
    model: Any,
    encoded: EncodedTexts,
    stored: HiddenStateFile,
    on_text: Callable[[int, int], None] | None = None,
) -> None:
    """Read every text once and write the file atomically; a complete existing file is kept.

    ``on_text`` is called with the number of texts read and the total. Raises ``SteerError`` if the
    file cannot be written, as on a full disk.
    """
    if stored.path.exists() and stored.path.stat().st_size == stored.bytes:
        return

    def write(file: IO[bytes]) -> None:
        texts = [encoded.inputs(row, count) for row, count in stored.counts.items()]
        for num_done, states in enumerate(_read(model, texts), 1):
            file.write(_bytes_of(states.cpu()))
            if on_text is not None:
                on_text(num_done, len(texts))

    write_atomically(stored.path, write)


def fetch_from_file(file: IO[bytes], stored: HiddenStateFile) -> FetchHiddenStates:
    """Hidden states from the open file that ``write_hidden_states`` wrote.

    They are read, not memory-mapped, so they do not count as the process's memory, and a disk
    failure is an exception and not a signal.
    """

    def fetch(batch: TextBatch) -> torch.Tensor:
        states = torch.empty((sum(batch.counts), stored.hidden_size), dtype=stored.dtype)
        start = 0
        for row, count in zip(batch.rows, batch.counts, strict=True):
            _fill(file, states[start : start + count], stored.places[row] * stored.position_bytes)
            start += count
        return states

    return fetch


def fetch_from_model(model: Any, encoded: EncodedTexts) -> FetchHiddenStates:
    """Hidden states that the model computes again for every batch."""

    def fetch(batch: TextBatch) -> torch.Tensor:
        pairs = zip(batch.rows, batch.counts, strict=True)
        texts = [encoded.inputs(row, count) for row, count in pairs]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        states_by_index = dict(
            zip(order, _read(model, [texts[index] for index in order]), strict=True)
        )
        return torch.cat([states_by_index[index] for index in range(len(texts))])

    return fetch


def _fill(file: IO[bytes], part: torch.Tensor, offset: int) -> None:
    try:
        num_read = os.preadv(file.fileno(), [_bytes_of(part)], offset)
    except OSError as error:
        raise SteerError(f"{file.name}: cannot be read ({cause(error)})") from error
    if num_read != part.numel() * part.itemsize:
        raise SteerError(f"{file.name}: it was cut short while it was in use; start again")


def _bytes_of(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU; numpy has no bfloat16."""
    return tensor.contiguous().view(torch.uint8).numpy()


@torch.no_grad()
def _read(model: Any, texts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """For each text in turn ``[its length, hidden_size]``; lengths ascend."""
    for window in _windows(texts):
        tokens = torch.nn.utils.rnn.pad_sequence(window, batch_first=True).to(model.device)
        hidden_states = backbone(model)(input_ids=tokens, use_cache=False).last_hidden_state
        for text, states in zip(window, hidden_states, strict=True):
            yield states[: len(text)]


def _windows(texts: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Batches of neighbouring texts with at most ``_WINDOW_TOKENS`` tokens including padding, or
    one longer text.
    """
    window: list[torch.Tensor] = []
    for text in texts:
        if window and (len(window) + 1) * len(text) > _WINDOW_TOKENS:
            yield window
            window = []
        window.append(text)
    if window:
        yield window
