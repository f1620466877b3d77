"""Copies host arrays to the device in one transfer."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

ALIGNMENT = 16  # of every array in the copy: what Triton compiles its widest loads for


def upload(arrays: Sequence[npt.NDArray[np.generic]], device: torch.device) -> list[torch.Tensor]:
    """Copy arrays to ``device``; the tensors share no memory with the arrays.

    On a GPU this is one asynchronous copy from pinned memory.
    """
    if device.type == "cpu":
        return [torch.from_numpy(np.array(array, order="C")) for array in arrays]
    if not arrays:
        return []
    sizes = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]
    host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    parts = [host[start : start + a.nbytes] for start, a in zip(starts, arrays, strict=True)]
    for part, array in zip(parts, arrays, strict=True):
        part.numpy()[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole = host.to(device, non_blocking=True)
    return [
        whole[start : start + array.nbytes].view(_dtype(array)).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]


def warm_up(device: torch.device) -> None:
    """Allocate pinned memory for uploads: two blocks of each power of two, 512 bytes to 1 MiB.

    PyTorch pins a block of each power of two when it is first asked for and keeps it; the first
    requests would wait for that otherwise.
    """
    if device.type != "cuda":
        return
    blocks = [
        torch.empty(1 << power, dtype=torch.uint8, pin_memory=True)
        for power in range(9, 21)
        for _ in range(2)
    ]
    del blocks


def _dtype(array: npt.NDArray[np.generic]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype
