"""Makes the token rules of a batch from the doses and the tests of its requests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_steer.bank import ConditionTable, SiteTable
from vllm_steer.doses import Span, token_spans
from vllm_steer.kernels.guidance import PLACEHOLDER_STRIDE, TokenRules
from vllm_steer.kernels.upload import upload
from vllm_steer.serving.step import IntArray, SteeredRequest
from vllm_steer.steers.schedules import schedule_curve

FloatArray = npt.NDArray[np.float32]

_NO_OFFSET = -1


class _Integers(NamedTuple):
    """One dose's integers, named as the fields of ``TokenRules``."""

    direction_start: int
    direction_stride: int = 0
    step0_position: int = 0
    pool_offset: int = _NO_OFFSET
    text_only: int = 0
    gate: int = 0


class _Floats(NamedTuple):
    """One dose's numbers, named as the fields of ``TokenRules``."""

    strength: float = 1.0
    slope: float = 0.0
    low: float = 0.0
    high: float = 0.0


class _DoseRules(NamedTuple):
    """What one dose, or one test of a condition, says: its numbers, tokens and layers."""

    integers: _Integers
    floats: _Floats
    spans: Sequence[Span]
    layers: Sequence[int]


@dataclass(frozen=True)
class RequestColumns:
    """One request's k doses at one site, computed once: ``[6, k]``, ``[4, k]`` and ``[L, k]``; the
    ``spans [2, S, k]`` of its tokens; and the bounds of its placeholders ``[B]``, empty if no dose
    leaves any out.
    """

    request: SteeredRequest
    integers: IntArray
    floats: FloatArray
    spans: IntArray
    layers: FloatArray
    placeholders: IntArray


ColumnsOf = Callable[[SteeredRequest], RequestColumns]


def guidance_rules(
    req_ids: Sequence[str],
    requests: Mapping[str, SteeredRequest],
    table: SiteTable,
    strength_pool: torch.Tensor,
    columns_by_request: dict[str, RequestColumns] | None = None,
    *,
    gated: bool = False,
) -> TokenRules:
    """The rules of a batch at one site, as deep as the most doses that one request takes there.

    ``strength_pool`` holds the strengths of dynamic doses, on the device of the rules;
    ``columns_by_request`` keeps each request's columns from one batch to the next. ``gated``: the
    engine has conditions.
    """
    rules = _rules(
        req_ids,
        requests,
        lambda request: _dose_columns(request, table),
        len(table.layers),
        strength_pool,
        columns_by_request,
    )
    if table.directions.readings is None:
        rules = replace(rules, low=None, high=None)
    return rules if gated else replace(rules, gate=None)


def condition_rules(
    req_ids: Sequence[str],
    requests: Mapping[str, SteeredRequest],
    table: ConditionTable,
    strength_pool: torch.Tensor,
    columns_by_request: dict[str, RequestColumns] | None = None,
) -> TokenRules:
    """The rules of a batch's tests at one site: a condition as direction, a verdict as gate."""
    rules = _rules(
        req_ids,
        requests,
        lambda request: _test_columns(request, table),
        len(table.layers),
        strength_pool,
        columns_by_request,
    )
    return replace(rules, low=None, high=None)


def _rules(
    req_ids: Sequence[str],
    requests: Mapping[str, SteeredRequest],
    columns_of: ColumnsOf,
    num_layers: int,
    strength_pool: torch.Tensor,
    columns_by_request: dict[str, RequestColumns] | None,
) -> TokenRules:
    columns_by_request = {} if columns_by_request is None else columns_by_request
    for ended in columns_by_request.keys() - requests.keys():
        del columns_by_request[ended]
    columns = {
        row: _cached_columns(req_id, requests[req_id], columns_of, columns_by_request)
        for row, req_id in enumerate(req_ids)
        if req_id in requests
    }
    depth = max((column.integers.shape[1] for column in columns.values()), default=0)
    num_spans = max((column.spans.shape[1] for column in columns.values()), default=1)
    shape = (depth, len(req_ids))
    integers = np.zeros((len(_Integers._fields), *shape), dtype=np.int64)
    integers[_Integers._fields.index("pool_offset")] = _NO_OFFSET
    floats = np.zeros((len(_Floats._fields), *shape), dtype=np.float32)
    spans = np.zeros((2, num_spans, *shape), dtype=np.int64)
    layers = np.zeros((num_layers, *shape), dtype=np.float32)
    for row, column in columns.items():
        num_doses = column.integers.shape[1]
        integers[:, :num_doses, row] = column.integers
        floats[:, :num_doses, row] = column.floats
        spans[:, : column.spans.shape[1], :num_doses, row] = column.spans
        layers[:, :num_doses, row] = column.layers
    bounds = [
        row * PLACEHOLDER_STRIDE + column.placeholders
        for row, column in columns.items()
        if len(column.placeholders)
    ]
    arrays = [integers, floats, spans, layers, *([np.concatenate(bounds)] if bounds else [])]
    whole, numbers, (begin, end), acts_in_layer, *uploaded_bounds = upload(
        arrays, strength_pool.device
    )
    fields = dict(zip(_Integers._fields, whole, strict=True))
    fields |= dict(zip(_Floats._fields, numbers, strict=True))
    text_only = fields.pop("text_only")
    if uploaded_bounds:
        fields |= {"text_only": text_only, "placeholder_bounds": uploaded_bounds[0]}
    return TokenRules(
        **fields,
        begin=begin,
        end=end,
        layers=acts_in_layer,
        strength_pool=strength_pool,
    )


def _cached_columns(
    req_id: str,
    request: SteeredRequest,
    columns_of: ColumnsOf,
    columns_by_request: dict[str, RequestColumns],
) -> RequestColumns:
    """The request's cached columns; an id may be reused by another request."""
    if req_id not in columns_by_request or columns_by_request[req_id].request is not request:
        columns_by_request[req_id] = columns_of(request)
    return columns_by_request[req_id]


def _dose_columns(request: SteeredRequest, table: SiteTable) -> RequestColumns:
    """The columns of a request's doses at a site."""
    rules, leaves_out = [], False
    for index, dose in enumerate(request.doses):
        entry = table.entries.get(dose.entry)
        if entry is None:
            continue
        leaves_out |= dose.phase == "text"
        integers = _Integers(
            direction_start=entry.start,
            direction_stride=0 if entry.steps is None else 1,
            step0_position=request.prompt_len - 1,
            pool_offset=request.pool_offsets.get(index, _NO_OFFSET),
            text_only=int(dose.phase == "text"),
            gate=request.gates.get(index, 0),
        )
        slope = 0.0 if entry.steps is None else schedule_curve(dose.schedule, entry.steps).slope
        floats = _Floats(dose.strength, slope, dose.low or 0.0, dose.high or 0.0)
        spans = token_spans(dose, entry.steps, request.prompt_len)
        rules.append(_DoseRules(integers, floats, spans, dose.layers or entry.layers))
    return _columns(request, rules, table.layers, request.placeholders if leaves_out else ())


def _test_columns(request: SteeredRequest, table: ConditionTable) -> RequestColumns:
    """The columns of a request's tests at a site."""
    rules = []
    for test in request.tests:
        entry = table.entries.get(test.condition)
        if entry is not None:
            integers = _Integers(direction_start=entry.number, gate=test.verdict)
            rules.append(_DoseRules(integers, _Floats(), (test.span,), (entry.layer,)))
    return _columns(request, rules, table.layers, ())


def _columns(
    request: SteeredRequest,
    rules: Sequence[_DoseRules],
    layers: Sequence[int],
    placeholders: Sequence[int],
) -> RequestColumns:
    integers = [rule.integers for rule in rules]
    floats = [rule.floats for rule in rules]
    acts = [np.isin(layers, rule.layers) for rule in rules]
    return RequestColumns(
        request,
        integers=np.array(integers, dtype=np.int64).reshape(-1, len(_Integers._fields)).T,
        floats=np.array(floats, dtype=np.float32).reshape(-1, len(_Floats._fields)).T,
        spans=_padded([rule.spans for rule in rules]),
        layers=np.array(acts, dtype=np.float32).reshape(-1, len(layers)).T,
        placeholders=np.array(placeholders, dtype=np.int64),
    )


def _padded(spans: Sequence[Sequence[Span]]) -> IntArray:
    """The spans of k doses as ``[2, S, k]``; missing ones are empty."""
    most = max([1, *map(len, spans)])
    padded = [[*one, *((0, 0),) * (most - len(one))] for one in spans]
    return np.array(padded, dtype=np.int64).reshape(-1, most, 2).transpose(2, 1, 0)
