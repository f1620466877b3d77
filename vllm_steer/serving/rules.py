"""From the doses of a batch's requests to the rules that the device maps tokens by."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vllm_steer.bank import Entry, LayerShelf
from vllm_steer.doses import Dose
from vllm_steer.kernels.guidance import Rules
from vllm_steer.serving.rows import SteeredRequest, to_device

_END = np.iinfo(np.int64).max
_INTEGERS = ("start", "stride", "origin", "first", "last")


def guidance_rules(
    req_ids: Sequence[str],
    requests: Mapping[str, SteeredRequest],
    shelf: LayerShelf,
    device: torch.device,
) -> Rules:
    """The rules of a batch at one site, as deep as the most doses that one request takes there."""
    taken = {
        row: [dose for dose in requests[req_id].doses if dose.steer in shelf.entries]
        for row, req_id in enumerate(req_ids)
        if req_id in requests
    }
    depth = max(map(len, taken.values()), default=0)
    shape = (depth, len(req_ids))
    integers = np.zeros((len(_INTEGERS), *shape), dtype=np.int64)
    floats = np.zeros((2, *shape), dtype=np.float32)
    layers = np.zeros((len(shelf.layers), *shape), dtype=np.float32)
    for row, doses in taken.items():
        prompt_len = requests[req_ids[row]].prompt_len
        for k, dose in enumerate(doses):
            entry = shelf.entries[dose.steer]
            integers[:, k, row] = _integers(dose, entry, prompt_len)
            floats[:, k, row] = dose.strength, _slope(dose, entry)
            layers[:, k, row] = np.isin(shelf.layers, dose.layers or entry.layers)
    on_device = to_device(integers, device)
    strength, slope = to_device(floats, device)
    named = dict(zip(_INTEGERS, on_device, strict=True))
    return Rules(**named, strength=strength, slope=slope, layers=to_device(layers, device))


def _integers(dose: Dose, entry: Entry, prompt_len: int) -> tuple[int, int, int, int, int]:
    stride, origin = (0, 0) if entry.steps is None else (1, prompt_len - 1)
    return (entry.start, stride, origin, *dose_span(dose, entry.steps, prompt_len))


def dose_span(dose: Dose, steps: int | None, prompt_len: int) -> tuple[int, int]:
    """The positions ``first <= p < last`` of the tokens that a dose touches."""
    first, last = 0, _END
    if dose.phase == "prompt":
        last = prompt_len
    elif dose.phase == "generation":
        first = prompt_len
    if steps is not None:
        taken = 1 if dose.schedule == "start" else steps
        first, last = max(first, prompt_len - 1), min(last, prompt_len - 1 + taken)
    return first, last


def _slope(dose: Dose, entry: Entry) -> float:
    return 1 / entry.steps if dose.schedule == "dim" and entry.steps else 0.0
