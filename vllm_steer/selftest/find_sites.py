"""Finds the sites of a decoder layer by a dummy run, and proves what a steer does there.

Every row of the run begins alike, and attention returns a fixed pattern, so rows differ by what the
test adds to them. ``delta`` is a large random vector. Blocks read their input through a norm, so
their own answer to ``delta`` and to ``delta / 2`` is the same, and the difference of both rows
shows what became of ``delta / 2`` alone, also where the answer is large:

    row       added                                   shows
    0, 1      nothing                                 the base, and how much equal rows differ
    4 l + 2   delta to the layer's first output       the next layer reads it; its factor,
    4 l + 3   delta / 2 to the layer's first output   with this one
    4 l + 4   delta to the layer's second output      whether the stream is their sum
    4 l + 5   delta to the attention's output         whether the layer reads it
    last two  delta / 2, delta to the first layer's   the factor of the first layer
              input

The names of modules follow from memory addresses: the input norm is the module whose output is the
attention's input, the projection the last linear layer whose output is the attention's output.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import nn

from vllm_steer.selftest.dummy_rows import (
    fixed_attention,
    hidden_states_of,
    make_alike,
    rows_of,
    tensors_of,
)

Reasons = Mapping[str, str]
Output = Literal["pair", "tensor"]

_DELTA: Final = 1e4
_FACTOR_TOLERANCE: Final = 0.02
_REMAINDER: Final = 0.05
_HEARD: Final = 1e-3
_ROWS_PER_LAYER: Final = 4
_OTHER_ROWS: Final = 4
_HALF: Final = 1
_SECOND: Final = 2
_ATTENTION: Final = 3
"""The rows of a layer after its first one."""
_LAYERS_PER_RUN: Final = 16
"""Bounds the rows that a run keeps on the host."""


@dataclass(frozen=True)
class LayerSites:
    """The sites of one layer. ``reasons`` has, for each site that it lacks, the reason.

    ``output`` says what the layer returns: ``pair``, two tensors whose sum is the residual stream,
    or ``tensor``, the stream itself. ``norm``, ``attention`` and ``projection`` are names of
    modules: of the layer's, and for the projection of the attention's; None where there is none.
    ``factor`` is what the next layer multiplies the stream by.
    """

    output: Output | None
    norm: str | None
    attention: str | None
    projection: str | None
    factor: float | None
    reasons: Reasons


class Stream(NamedTuple):
    """How layers of one class return the residual stream, its factor, or why it cannot be used."""

    output: Output | None
    factor: float | None
    reason: str | None


Streams = Mapping[str, Stream]
"""By the name of the layers' class."""


class Kinds(NamedTuple):
    """The classes of vLLM's attention layers, state-space layers included, and linear layers."""

    attention: type
    linear: type


@dataclass
class _Observed:
    """What the hooks saw of one layer."""

    input_addresses: list[int] = field(default_factory=list)
    outputs: list[torch.Tensor | None] = field(default_factory=list)
    norm: str | None = None
    attentions: list[str] = field(default_factory=list)
    projection: str | None = None
    reads_stream: bool = False
    returns_more: bool = False
    # Tensors are kept until the layer returns: an address that is free is given away again.
    producers: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    linears: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    replicas: dict[str, torch.Tensor] = field(default_factory=dict)
    is_called: bool = False
    shape: str = ""
    fewer_rows: str = ""


def find_sites(
    layers: nn.ModuleList,
    numbers: Sequence[int],
    hidden_size: int,
    run: Callable[[int], Any],
    *,
    max_rows: int,
    attention_layers: Sequence[nn.Module],
    kinds: Kinds,
    spread: Callable[[torch.Tensor], torch.Tensor] = torch.zeros_like,
    of_first_stage: Callable[[float], float] = lambda factor: factor,
    over_stages: Callable[[Streams], Streams] = lambda streams: streams,
    may_scale: bool = False,
    expected: Output | None = None,
) -> dict[int, LayerSites]:
    """The sites of the layers ``numbers``, by dummy runs of at most ``max_rows`` rows.

    ``attention_layers`` are vLLM's, in or outside the layers. ``run(n)`` is a forward pass of ``n``
    tokens, eager, without attention metadata. ``spread`` gives the difference of numbers over the
    tensor-parallel ranks, ``of_first_stage`` the first pipeline stage's value of a number.
    ``over_stages`` joins what each stage knows of the streams. ``may_scale``: the model multiplies
    its stream in each layer, as its authors do. ``expected`` is what its layers are known to return
    where no run can tell: in stages of one layer. Raises ``ValueError`` for fewer than 8 rows.
    """
    if max_rows < 8:
        raise ValueError(f"the self-test needs batches of 8 tokens; {max_rows} are allowed")
    per_run = min(_LAYERS_PER_RUN, max(1, (max_rows - _OTHER_ROWS) // _ROWS_PER_LAYER))
    layer_sites: dict[int, LayerSites] = {}
    first_factor = 1.0
    for start in range(0, len(numbers), per_run):
        part = numbers[start : start + per_run]
        test = _Test(layers, numbers, part, hidden_size, kinds, may_scale=may_scale)
        with fixed_attention(attention_layers):
            layer_sites |= test.verdicts(run, spread)
        if start == 0 and numbers:
            first_factor = test.first_factor(layer_sites[numbers[0]].output)
    reason = _factor_reason(of_first_stage(first_factor), "the first layer", may_scale)
    if reason is not None:
        added = dict.fromkeys(("resid", "attn_out", "heads"), reason)
        layer_sites = {
            number: replace(sites, reasons={**added, **sites.reasons})
            for number, sites in layer_sites.items()
        }
    return _completed(layer_sites, layers, over_stages, expected)


class _Test:
    """One dummy run that asks about the layers ``part``."""

    def __init__(
        self,
        layers: nn.ModuleList,
        numbers: Sequence[int],
        part: Sequence[int],
        hidden_size: int,
        kinds: Kinds,
        *,
        may_scale: bool,
    ) -> None:
        self._kinds = kinds
        self._layers = layers
        self._may_scale = may_scale
        self._numbers = list(numbers)
        self._part = list(part)
        self._width = hidden_size
        self._rows = max(8, _OTHER_ROWS + _ROWS_PER_LAYER * len(part))
        generator = torch.Generator().manual_seed(0)
        self._base = torch.randn(hidden_size, generator=generator)
        self._delta = torch.randn(hidden_size, generator=generator) * _DELTA
        self._observed = {number: _Observed() for number in numbers}
        self._tolerance = _HEARD * _DELTA
        followers = {
            follower for number in part if (follower := self._follower(number)) is not None
        }
        self._kept = {*part, *followers, *self._numbers[:1]}

    def verdicts(
        self, run: Callable[[int], Any], spread: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[int, LayerSites]:
        """Run the test and judge each layer of the part."""
        with self._hooked(), torch.inference_mode():
            run(self._rows)
        differing = self._differing(spread)
        return {number: self._judge(number, differing[number]) for number in self._part}

    def _differing(self, spread: Callable[[torch.Tensor], torch.Tensor]) -> dict[int, list[str]]:
        """The sites of each layer whose tensors are not equal on all ranks."""
        rows = [
            self._observed[number].replicas.get(site, torch.zeros(self._width))
            for number in self._part
            for site in _REPLICATED
        ]
        stacked = torch.stack(rows)
        limits = self._tolerance / _DELTA * stacked.abs().amax(1).clamp_min(1e-3)
        apart = spread(stacked).amax(1) > limits
        flags = apart.reshape(len(self._part), len(_REPLICATED)).tolist()
        return {
            number: [site for site, flag in zip(_REPLICATED, layer, strict=True) if flag]
            for number, layer in zip(self._part, flags, strict=True)
        }

    # --- hooks -------------------------------------------------------------------------------

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for number in self._numbers:
                handles += self._hook_layer(number)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook_layer(self, number: int) -> Iterator[Any]:
        layer, observed = self._layers[number], self._observed[number]
        yield layer.register_forward_pre_hook(self._on_input(number), with_kwargs=True)
        for name, child in layer.named_children():
            is_attention = any(isinstance(m, self._kinds.attention) for m in child.modules())
            if is_attention:
                for inner, module in child.named_modules():
                    if inner and self._is_linear(module):
                        yield module.register_forward_hook(_record_linear(observed, inner))
                yield child.register_forward_hook(
                    self._on_attention(number, name), with_kwargs=True
                )
            else:
                yield child.register_forward_hook(self._on_child(observed, name))
        yield layer.register_forward_hook(self._on_output(number))

    def _on_input(self, number: int) -> Callable[..., None]:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            observed = self._observed[number]
            streams = self._streams((args, kwargs))
            if number == self._numbers[0] and not observed.is_called:
                self._begin(streams)
            observed.is_called = True
            observed.input_addresses = [stream.data_ptr() for stream in streams]
            if number in self._kept:
                observed.inputs = [self._copied(stream) for stream in streams]

        return hook

    def _begin(self, streams: list[torch.Tensor]) -> None:
        """Make all rows of the first layer's input alike, but for the last two."""
        make_alike(streams, self._base)
        if streams:
            self._add(streams[0], -1)
            self._add(streams[0], -2, 0.5)
            rounding = 8 * torch.finfo(streams[0].dtype).eps
            self._tolerance = max(_HEARD, rounding) * _DELTA

    def _on_child(self, observed: _Observed, name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            if tensors := self._streams(output):
                observed.producers.append((name, tensors[0]))

        return hook

    def _on_attention(self, number: int, name: str) -> Callable[..., None]:
        def hook(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            observed = self._observed[number]
            inputs, outputs = self._streams((args, kwargs)), self._streams(output)
            if not outputs:
                return
            observed.attentions.append(name)
            observed.returns_more = len({tensor.data_ptr() for tensor in outputs}) > 1
            address = inputs[0].data_ptr() if inputs else None
            observed.norm = _last_with_address(observed.producers, address)
            observed.reads_stream = address in observed.input_addresses
            observed.projection = _last_with_address(observed.linears, outputs[0].data_ptr())
            if inputs:
                observed.replicas["attn_in"] = self._first_row(inputs[0])
            observed.replicas["attn_out"] = self._first_row(outputs[0])
            observed.producers.append((name, outputs[0]))
            if number in self._part:
                self._add(outputs[0], self._row(number) + _ATTENTION)

        return hook

    def _on_output(self, number: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            observed = self._observed[number]
            parts = list(output) if isinstance(output, tuple | list) else [output]
            observed.shape = _described(parts)
            observed.producers.clear()
            observed.linears.clear()
            observed.fewer_rows = self._fewer_rows(parts[0])
            streams = [rows_of(part, self._rows, self._width) for part in parts]
            if isinstance(output, list) or len(parts) > 2:
                streams = [None]  # the hook of a steer takes a tensor or two of them
            first, second = (*streams, None)[:2]
            if first is not None and second is not None and first.data_ptr() == second.data_ptr():
                streams[1] = None
            if number in self._kept:
                observed.outputs = [
                    None if stream is None else self._copied(stream) for stream in streams
                ]
            if first is not None:
                observed.replicas["resid"] = self._first_row(first)
            if number in self._part and streams[0] is not None:
                self._add(streams[0], self._row(number))
                self._add(streams[0], self._row(number) + _HALF, 0.5)
                if len(streams) > 1 and streams[1] is not None:
                    self._add(streams[1], self._row(number) + _SECOND)

        return hook

    def _fewer_rows(self, value: Any) -> str:
        """The reason against a tensor with the rows of some tokens only; empty for any other."""
        if not isinstance(value, torch.Tensor) or value.shape[-1:] != (self._width,):
            return ""
        rows = value.numel() // self._width
        if rows >= self._rows:
            return ""
        return (
            f"the layer returns {rows} of {self._rows} tokens: the ranks hold different tokens "
            "(sequence parallelism)"
        )

    def _is_linear(self, module: nn.Module) -> bool:
        return isinstance(getattr(module, "base_layer", module), self._kinds.linear)

    def _row(self, number: int) -> int:
        return 2 + _ROWS_PER_LAYER * self._part.index(number)

    def _add(self, stream: torch.Tensor, row: int, share: float = 1.0) -> None:
        stream[row] += (share * self._delta).to(stream)

    def _streams(self, values: Any) -> list[torch.Tensor]:
        return hidden_states_of(values, self._rows, self._width)

    def _first_row(self, stream: torch.Tensor) -> torch.Tensor:
        return stream[0].float().cpu().clone()

    def _copied(self, stream: torch.Tensor) -> torch.Tensor:
        return stream.float().cpu().clone()

    # --- verdicts ----------------------------------------------------------------------------

    def _judge(self, number: int, differing: Sequence[str]) -> LayerSites:
        observed = self._observed[number]
        if not observed.is_called:
            reason = "the forward pass does not call the layer as a module"
            return LayerSites(None, None, None, None, None, dict.fromkeys(_SITES, reason))
        reasons: dict[str, str] = {}
        output, factor = self._judge_stream(number, reasons)
        attention = self._judge_attention(number, reasons)
        norm = observed.norm if attention is not None else None
        if attention is not None and norm is None:
            reasons["attn_in"] = (
                "the attention reads the residual stream without a norm before it"
                if observed.reads_stream
                else "the attention's input is not the output of one module of the layer"
            )
        reason = "each tensor-parallel rank has a partial sum there"
        reasons |= {site: reason for site in differing if site not in reasons}
        projection = observed.projection if attention is not None else None
        if attention is not None and projection is None:
            reasons.setdefault("heads", "the attention's output is not that of a linear layer")
        return LayerSites(output, norm, attention, projection, factor, reasons)

    def _judge_stream(
        self, number: int, reasons: dict[str, str]
    ) -> tuple[Output | None, float | None]:
        observed = self._observed[number]
        if not observed.outputs or observed.outputs[0] is None:
            reasons["resid"] = observed.fewer_rows or (
                f"the layer returns {observed.shape}; expected a tensor of {self._width} numbers "
                "per token first"
            )
            return None, None
        follower = self._follower(number)
        if follower is None:
            return None, None  # ``_completed`` takes the verdict of a layer of its class
        return self._judge_with(number, follower, reasons)

    def _judge_with(
        self, number: int, follower: int, reasons: dict[str, str]
    ) -> tuple[Output | None, float | None]:
        first = self._row(number)
        half, second = first + _HALF, first + _SECOND
        later = self._observed[follower]
        moved = [stream[first] - stream[0] for stream in later.inputs]
        heard = [change for change in moved if change.abs().max() > self._tolerance]
        if len(heard) != 1 or not _close(heard[0], self._delta, self._tolerance):
            reasons["resid"] = "the next layer does not read what the layer returns"
            return None, None
        if not later.outputs or later.outputs[0] is None:
            reasons["resid"] = f"the next layer returns {later.shape}"
            return None, None
        has_second = len(self._observed[number].outputs) > 1 and (
            self._observed[number].outputs[1] is not None
        )
        output: Output = "tensor"
        if has_second and not _close(
            _sum(later, second, True), _sum(later, 0, True), self._tolerance
        ):
            if not _close(_sum(later, first, True), _sum(later, second, True), 2 * self._tolerance):
                reasons["resid"] = "the layer returns two tensors whose sum is not what is read"
                return None, None
            output = "pair"
        change = _sum(later, first, output == "pair") - _sum(later, half, output == "pair")
        factor, remainder = _projected(change, self._delta / 2)
        if not (remainder < _REMAINDER and torch.isfinite(change).all()):
            reasons["resid"] = "what is added to the layer's output is not passed on as one stream"
            return None, None
        if reason := _factor_reason(factor, f"layer {follower}", self._may_scale):
            reasons["resid"] = reason
        return output, factor

    def first_factor(self, output: Output | None) -> float:
        """What the first layer of this rank multiplies its input by.

        ``output`` is None where no later layer has shown what the first one returns: of a sum and
        a first tensor, the one that passes its input on is the stream.
        """
        first = self._observed[self._numbers[0]]
        if not first.outputs or first.outputs[0] is None:
            return 1.0
        forms = (False, True) if output is None else (output == "pair",)
        last = self._rows - 1
        changes = [_sum(first, last, form) - _sum(first, last - 1, form) for form in forms]
        factors = [_projected(change, self._delta / 2)[0] for change in changes]
        return min(factors, key=lambda factor: abs(factor - 1))

    def _judge_attention(self, number: int, reasons: dict[str, str]) -> str | None:
        observed = self._observed[number]
        reason = None
        if not observed.attentions:
            reason = "the layer has no attention that returns a tensor"
        elif len(observed.attentions) > 1:
            reason = f"the layer has more than one attention: {', '.join(observed.attentions)}"
        elif observed.returns_more:
            reason = f"its {observed.attentions[0]} returns more than the attention's output"
        if reason is not None:
            reasons |= dict.fromkeys(("attn_in", "attn_out", "heads"), reason)
            return None
        row = self._row(number) + _ATTENTION
        if not observed.outputs or observed.outputs[0] is None:
            return observed.attentions[0]
        noise = (_sum(observed, 1, True) - _sum(observed, 0, True)).abs().max()
        change = (_sum(observed, row, True) - _sum(observed, 0, True)).abs().max()
        if not change > 4 * noise:
            reason = "the layer does not read what its attention returns"
            reasons |= dict.fromkeys(("attn_out", "heads"), reason)
        return observed.attentions[0]

    def _follower(self, number: int) -> int | None:
        """The next layer of this rank; None for the last one."""
        index = self._numbers.index(number) + 1
        return self._numbers[index] if index < len(self._numbers) else None


_SITES: Final = ("resid", "attn_in", "attn_out", "heads")
_REPLICATED: Final = ("resid", "attn_in", "attn_out")


def _completed(
    layer_sites: Mapping[int, LayerSites],
    layers: nn.ModuleList,
    over_stages: Callable[[Streams], Streams],
    expected: Output | None,
) -> dict[int, LayerSites]:
    """The last layer has no follower: it has the stream of another layer of the same class."""
    streams = {
        type(layers[number]).__qualname__: Stream(
            sites.output, sites.factor, sites.reasons.get("resid")
        )
        for number, sites in sorted(layer_sites.items())
        if sites.output is not None or "resid" in sites.reasons
    }
    streams = dict(over_stages(streams))
    if not layer_sites:
        return {}
    last = max(layer_sites)
    sites = layer_sites[last]
    if "resid" in sites.reasons or sites.output is not None:
        return dict(layer_sites)
    stream = streams.get(type(layers[last]).__qualname__, Stream(expected, None, None))
    reasons = dict(sites.reasons)
    if stream.reason is not None:
        reasons["resid"] = stream.reason
    elif stream.output is None:
        reasons["resid"] = "no other layer has the same class, so what it returns cannot be tested"
    return {
        **layer_sites,
        last: replace(sites, output=stream.output, factor=stream.factor, reasons=reasons),
    }


def _factor_reason(factor: float, layer: str, may_scale: bool) -> str | None:
    """Why a stream that a layer passes on with this factor cannot be steered; None for 1."""
    if not factor >= 0.05:  # NaN too
        return f"{layer} normalises its input instead of adding to it"
    if abs(factor - 1) > _FACTOR_TOLERANCE and not may_scale:
        return f"{layer} multiplies what is added to its input by {factor:.3g}"
    return None


def _last_with_address(
    tensors: Sequence[tuple[str, torch.Tensor]], address: int | None
) -> str | None:
    names = [name for name, tensor in tensors if tensor.data_ptr() == address]
    return names[-1] if names else None


def _record_linear(observed: _Observed, name: str) -> Callable[..., None]:
    def hook(_module: Any, _args: Any, output: Any) -> None:
        if tensors := tensors_of(output):
            observed.linears.append((name, tensors[0]))

    return hook


def _described(parts: Sequence[Any]) -> str:
    kinds = [
        str(list(part.shape)) if isinstance(part, torch.Tensor) else type(part).__name__
        for part in parts
    ]
    return ", ".join(kinds)


def _sum(observed: _Observed, row: int, pair: bool) -> torch.Tensor:
    """The residual stream of a row after a layer."""
    first, *others = observed.outputs
    assert first is not None
    second = others[0] if others else None
    return first[row] + second[row] if pair and second is not None else first[row]


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return bool((a.float().cpu() - b.float().cpu()).abs().max() <= tolerance)


def _projected(change: torch.Tensor, delta: torch.Tensor) -> tuple[float, float]:
    """The factor of ``delta`` in the change, and the norm of what is left over that of delta."""
    factor = float((change @ delta) / (delta @ delta))
    return factor, float((change - factor * delta).norm() / delta.norm())
