"""From host arrays to a device in one copy, tried on a device that is not there."""

import numpy as np
import pytest
import torch

from vllm_steer.kernels.upload import upload, warm_up


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The way to a device, with nothing pinned: the meta device keeps shapes and dtypes."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **kw: empty(*a, **kw))
    return torch.device("meta")


def test_an_empty_upload_gives_nothing(device: torch.device) -> None:
    assert upload([], device) == []
    assert upload([], torch.device("cpu")) == []


def test_empty_arrays_and_arrays_of_any_dtype_keep_shape_and_dtype(device: torch.device) -> None:
    arrays = [
        np.empty((0, 5), dtype=np.int32),
        np.arange(6, dtype=np.int64).reshape(2, 3).T,
        np.array([True, False]),
        np.float32(3.0) * np.ones(7, dtype=np.float32),
        np.empty(0, dtype=np.int64),
    ]
    for target in (device, torch.device("cpu")):
        result = upload(arrays, target)
        assert [tuple(t.shape) for t in result] == [a.shape for a in arrays]
        assert [t.dtype for t in result] == [torch.from_numpy(np.array(a)).dtype for a in arrays]


def test_pinned_memory_is_ready_for_every_size_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    empty = torch.empty

    def allocate(size: int, *, pin_memory: bool, **kw: torch.dtype) -> torch.Tensor:
        pinned.append(size)
        return empty(0)

    monkeypatch.setattr(torch, "empty", allocate)
    warm_up(torch.device("cpu"))
    assert pinned == []
    warm_up(torch.device("cuda"))
    assert sorted(set(pinned)) == [1 << power for power in range(9, 21)]
    assert len(pinned) == 2 * len(set(pinned))
