"""What the strengths of some directions are multiplied by: tables of ``kernels.guidance.Readings``.

A projection reads the token along its own direction, an SAE's feature along its encoder.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_steer.kernels.guidance import GAINS, Readings
from vllm_steer.steers import DeltaSteer, LowRankSteer, SAESteer, VectorSteer
from vllm_steer.steers.vector import UNIT_MODES

LayerSteer = VectorSteer | DeltaSteer | SAESteer | LowRankSteer


def rows_of(steer: LayerSteer, layer: int) -> torch.Tensor:
    """The directions ``[n, width]`` float32 of a steer in one layer: what its strengths multiply.

    A unit vector where the mode says so; of a low-rank map what it adds to a tensor of zeros.
    """
    index = steer.layers.index(layer)
    match steer:
        case DeltaSteer():
            return steer.delta[:, index].float()
        case SAESteer():
            return steer.decoder[index].float()[None]
        case LowRankSteer():
            if steer.bias is None:
                return torch.zeros(1, steer.hidden_size)
            return (steer.b[index].double() @ steer.bias[index].double()).float()[None]
    vector = steer.vectors[index].double()
    return (vector / vector.norm() if steer.mode in UNIT_MODES else vector).float()[None]


def reads(steer: LayerSteer) -> bool:
    """Whether the change of a steer's directions depends on the token."""
    return gain_of(steer) != "constant"


def gain_of(steer: LayerSteer) -> str:
    """What a steer's strength is multiplied by, among ``GAINS``."""
    mode = steer.mode if isinstance(steer, VectorSteer | SAESteer) else "add"
    gains = {"relative": "norm", "project": "clamp", "clamp": "clamp", "scale": "activation"}
    return gains.get(mode, "constant")


@dataclass(frozen=True)
class FeatureReader:
    """What a feature of an autoencoder reads in L layers: its encoder ``vectors [L, width]``,
    ``bias [L]`` and ``threshold [L]``, float32; zeros and no threshold in layers that it lacks.
    """

    vectors: torch.Tensor
    bias: torch.Tensor
    threshold: torch.Tensor


def feature_reader(steer: SAESteer, layers: Sequence[int]) -> FeatureReader:
    """The reader of a feature in ``layers``."""
    vectors = torch.zeros(len(layers), steer.hidden_size)
    bias, threshold = torch.zeros(len(layers)), torch.full((len(layers),), -math.inf)
    for index, layer in enumerate(layers):
        if layer in steer.layers:
            row = steer.layers.index(layer)
            vectors[index] = steer.encoder[row].float()
            bias[index], threshold[index] = steer.bias[row].float(), steer.threshold[row].float()
    return FeatureReader(vectors, bias, threshold)


class ReadingsBuilder:
    """The readings of a site's directions ``vectors [L, D, width]`` in ``layers``.

    ``num_reserved`` readers are for steers that are loaded later, the first ones.
    """

    def __init__(self, vectors: torch.Tensor, layers: Sequence[int], num_reserved: int) -> None:
        self._vectors = vectors
        self._layers = layers
        self._num_reserved = num_reserved
        self._gains = torch.tensor([GAINS["constant"]]).repeat(vectors.shape[1], 1)
        self._reader_of = torch.full((vectors.shape[1],), -1, dtype=torch.int32)
        self._readers: list[tuple[LayerSteer, int]] = []

    def add(self, steer: LayerSteer, direction: int) -> None:
        """A steer of the config, whose first direction is ``direction``."""
        gain = gain_of(steer)
        if gain == "constant":
            return
        self._gains[direction] = torch.tensor(GAINS[gain])
        if gain != "norm":
            self._reader_of[direction] = self._num_reserved + len(self._readers)
            self._readers.append((steer, direction))

    def build(self) -> Readings:
        """The tables on the device of the directions."""
        vectors = self._vectors
        num_readers = max(1, self._num_reserved + len(self._readers))
        readers = vectors.new_zeros(len(self._layers), num_readers, vectors.shape[2])
        bias = torch.zeros(len(self._layers), num_readers)
        threshold = torch.full((len(self._layers), num_readers), -math.inf)
        for number, (steer, direction) in enumerate(self._readers, self._num_reserved):
            if isinstance(steer, SAESteer):
                reader = feature_reader(steer, self._layers)
                readers[:, number] = reader.vectors.to(vectors)
                bias[:, number], threshold[:, number] = reader.bias, reader.threshold
            else:
                readers[:, number] = vectors[:, direction]
        device = vectors.device
        return Readings(
            self._reader_of.to(device),
            self._gains.to(device),
            readers,
            bias.to(device),
            threshold.to(device),
        )


def write_reading(
    readings: Readings,
    steer: LayerSteer,
    start: int,
    end: int,
    index: int,
    reader: FeatureReader | torch.Tensor,
) -> None:
    """Write what a steer that is loaded later multiplies its directions ``start:end`` by.

    ``index`` is its number among the reserved vectors; ``reader`` is what it reads: that of a
    feature, or its directions ``[L, n, width]``.
    """
    gain = gain_of(steer)
    for column, value in enumerate(GAINS[gain]):
        readings.gains[start:end, column] = value
    is_read = gain in ("clamp", "activation")
    readings.reader_of[start:end] = index if is_read else -1
    if not is_read:
        return
    if isinstance(reader, FeatureReader):
        readings.vectors[:, index].copy_(reader.vectors, non_blocking=True)
        readings.bias[:, index].copy_(reader.bias, non_blocking=True)
        readings.threshold[:, index].copy_(reader.threshold, non_blocking=True)
    else:
        readings.vectors[:, index].copy_(reader[:, 0], non_blocking=True)
        readings.bias[:, index] = 0.0
        readings.threshold[:, index] = -math.inf
