"""From host arrays to a device in one copy, tried on a device that is not there."""

import numpy as np
import pytest
import torch

from vllm_steer.kernels.upload import upload


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The way to a device, with nothing pinned: the meta device keeps shapes and dtypes."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **kw: empty(*a, **kw))
    return torch.device("meta")


def test_nothing_to_upload_is_nothing(device: torch.device) -> None:
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
    for where in (device, torch.device("cpu")):
        found = upload(arrays, where)
        assert [tuple(t.shape) for t in found] == [a.shape for a in arrays]
        assert [t.dtype for t in found] == [torch.from_numpy(np.array(a)).dtype for a in arrays]
