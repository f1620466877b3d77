"""Makes the token rules of a batch from the doses of its requests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_steer.bank import DirectionRange, SiteTable
from vllm_steer.doses import Dose, token_span
from vllm_steer.kernels.guidance import PLACEHOLDER_STRIDE, TokenRules
from vllm_steer.kernels.upload import upload
from vllm_steer.serving.step import IntArray, SteeredRequest
from vllm_steer.steers.schedules import schedule_curve

FloatArray = npt.NDArray[np.float32]

_NO_OFFSET = -1
_INTEGERS = (
    *("direction_start", "direction_stride", "step0_position", "begin", "end"),
    *("pool_offset", "text_only"),
)


@dataclass(frozen=True)
class RequestColumns:
    """One request's doses at one site, computed once: ``[7, k]``, ``[2, k]`` and ``[L, k]``; and
    the bounds of its placeholders ``[B]``, empty if no dose leaves any out.
    """

    request: SteeredRequest
    integers: IntArray
    floats: FloatArray
    layers: FloatArray
    placeholders: IntArray


def guidance_rules(
    req_ids: Sequence[str],
    requests: Mapping[str, SteeredRequest],
    table: SiteTable,
    strength_pool: torch.Tensor,
    columns_by_request: dict[str, RequestColumns] | None = None,
) -> TokenRules:
    """The rules of a batch at one site, as deep as the most doses that one request takes there.

    ``strength_pool`` holds the strengths of dynamic doses, on the device of the rules;
    ``columns_by_request`` keeps each request's columns from one batch to the next.
    """
    columns_by_request = {} if columns_by_request is None else columns_by_request
    for ended in columns_by_request.keys() - requests.keys():
        del columns_by_request[ended]
    columns = {
        row: _cached_columns(req_id, requests[req_id], table, columns_by_request)
        for row, req_id in enumerate(req_ids)
        if req_id in requests
    }
    depth = max((column.integers.shape[1] for column in columns.values()), default=0)
    shape = (depth, len(req_ids))
    integers = np.zeros((len(_INTEGERS), *shape), dtype=np.int64)
    integers[_INTEGERS.index("pool_offset")] = _NO_OFFSET
    floats = np.zeros((2, *shape), dtype=np.float32)
    layers = np.zeros((len(table.layers), *shape), dtype=np.float32)
    for row, column in columns.items():
        num_doses = column.integers.shape[1]
        integers[:, :num_doses, row] = column.integers
        floats[:, :num_doses, row] = column.floats
        layers[:, :num_doses, row] = column.layers
    bounds = [
        row * PLACEHOLDER_STRIDE + column.placeholders
        for row, column in columns.items()
        if len(column.placeholders)
    ]
    arrays = [integers, floats, layers, *([np.concatenate(bounds)] if bounds else [])]
    whole, (strength, slope), acts_in_layer, *uploaded_bounds = upload(arrays, strength_pool.device)
    integers_by_field = dict(zip(_INTEGERS, whole, strict=True))
    text_only = integers_by_field.pop("text_only")
    if uploaded_bounds:
        integers_by_field |= {"text_only": text_only, "placeholder_bounds": uploaded_bounds[0]}
    return TokenRules(
        **integers_by_field,
        strength=strength,
        slope=slope,
        layers=acts_in_layer,
        strength_pool=strength_pool,
    )


def _cached_columns(
    req_id: str,
    request: SteeredRequest,
    table: SiteTable,
    columns_by_request: dict[str, RequestColumns],
) -> RequestColumns:
    """The request's cached columns; an id may be reused by another request."""
    if req_id not in columns_by_request or columns_by_request[req_id].request is not request:
        columns_by_request[req_id] = _columns(request, table)
    return columns_by_request[req_id]


def _columns(request: SteeredRequest, table: SiteTable) -> RequestColumns:
    site_doses = [
        (dose, table.entries[dose.entry], request.pool_offsets.get(index, _NO_OFFSET))
        for index, dose in enumerate(request.doses)
        if dose.entry in table.entries
    ]
    integers = [
        (*_integers(dose, entry, request.prompt_len), offset, dose.phase == "text")
        for dose, entry, offset in site_doses
    ]
    leaves_out = any(dose.phase == "text" for dose, _, _ in site_doses)
    floats = [(dose.strength, _slope(dose, entry)) for dose, entry, _ in site_doses]
    acts = [np.isin(table.layers, dose.layers or entry.layers) for dose, entry, _ in site_doses]
    return RequestColumns(
        request,
        integers=np.array(integers, dtype=np.int64).reshape(-1, len(_INTEGERS)).T,
        floats=np.array(floats, dtype=np.float32).reshape(-1, 2).T,
        layers=np.array(acts, dtype=np.float32).reshape(-1, len(table.layers)).T,
        placeholders=np.array(request.placeholders if leaves_out else (), dtype=np.int64),
    )


def _integers(dose: Dose, entry: DirectionRange, prompt_len: int) -> tuple[int, int, int, int, int]:
    stride = 0 if entry.steps is None else 1
    return (entry.start, stride, prompt_len - 1, *token_span(dose, entry.steps, prompt_len))


def _slope(dose: Dose, entry: DirectionRange) -> float:
    return 0.0 if entry.steps is None else schedule_curve(dose.schedule, entry.steps).slope
