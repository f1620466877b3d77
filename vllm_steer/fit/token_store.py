"""Activations on disk, layer by layer: for data larger than memory."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_steer.errors import SteerError

Rows = NDArray[np.floating[Any]]


@dataclass
class TokenStore:
    """One nameless file per layer; rows are added to all of them and read from one."""

    files: Sequence[IO[bytes]]
    count: int = 0
    shape: tuple[int, ...] = field(default=(), init=False)
    dtype: str = field(default="", init=False)

    def add(self, rows: torch.Tensor) -> None:
        """Append rows ``[n, layers, width]``; ``SteerError`` if the disk does not take them."""
        values = rows.numpy()
        self.shape, self.dtype = values.shape[2:], str(values.dtype)
        try:
            for layer, file in enumerate(self.files):
                file.write(np.ascontiguousarray(values[:, layer]).tobytes())
                file.flush()
        except OSError as error:
            raise SteerError(
                f"the activations cannot be kept on disk ({error.strerror}); about "
                f"{values[0].nbytes} bytes are needed for every token"
            ) from error
        self.count += len(values)

    def layer(self, index: int) -> Rows:
        """All rows of the layer at an index, ``[count, width]``, read as they are used."""
        return np.memmap(
            self.files[index], dtype=self.dtype, mode="r", shape=(self.count, *self.shape)
        )


@contextmanager
def token_store(layers: int, folder: Path | None = None) -> Iterator[TokenStore]:
    """A store for ``layers`` layers in a folder, or where temporary files go.

    Its files have no name: the system drops them with the process, however that ends. Raises
    ``SteerError`` for a folder that takes no files.
    """
    with ExitStack() as opened:
        try:
            files = [opened.enter_context(TemporaryFile(dir=folder)) for _ in range(layers)]
        except OSError as error:
            raise SteerError(f"{folder}: takes no files ({error.strerror})") from error
        yield TokenStore(files)
