"""Changes that depend on the token, gates and conditions in Triton, against float64."""

import math

import pytest
import torch

from vllm_steer.kernels.guidance import (
    GAINS,
    Conditions,
    Directions,
    Gates,
    Readings,
    TokenMap,
    cpu,
    reference,
    torch_gather,
    triton_fused,
)
from vllm_steer.kernels.guidance.operands import CAST, COSINE, DOT

LAYERS, DOSES, DIRECTIONS, READERS = 2, 3, 6, 3
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def random_case(
    num_tokens: int, width: int, device: torch.device, *, rotates: bool, gated: bool, seed: int = 0
) -> tuple[Directions, TokenMap]:
    """Directions of every gain, some with a reader, and a map that uses all of them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).to(device)

    vectors = normal(LAYERS, DIRECTIONS, width)
    vectors[:, 0] = 0.0
    names = ("constant", "constant", "norm", "clamp", "activation", "clamp")
    readings = Readings(
        reader_of=torch.tensor([-1, -1, -1, 0, 1, 2], dtype=torch.int32, device=device),
        gains=torch.tensor([GAINS[name] for name in names], device=device),
        vectors=normal(LAYERS, READERS, width) / math.sqrt(width),
        bias=normal(LAYERS, READERS),
        threshold=torch.tensor([[-math.inf, 0.0, 0.5]] * LAYERS, device=device),
    )
    is_rotation = None
    if rotates:
        is_rotation = torch.zeros(DIRECTIONS, device=device)
        is_rotation[1] = 1.0
    gates = Gates(
        verdicts=torch.tensor(
            [[0.0] * 4, [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], device=device
        ),
        needed=torch.tensor([0.0, 1, 2, 2, 1], device=device),
    )
    low = normal(DOSES, num_tokens) - 1
    low[0] = -math.inf
    token_map = TokenMap(
        directions=integers(0, DIRECTIONS, DOSES, num_tokens).to(torch.int32),
        strengths=normal(LAYERS, DOSES, num_tokens) * integers(0, 2, LAYERS, DOSES, num_tokens),
        low=low,
        high=low.clamp_min(-1) + normal(DOSES, num_tokens).abs(),
        gate=integers(0, 5, DOSES, num_tokens).to(torch.int32) if gated else None,
        gates=gates if gated else None,
    )
    return Directions(vectors, is_rotation, readings), token_map


def on_host(directions: Directions, token_map: TokenMap) -> tuple[Directions, TokenMap]:
    readings = directions.readings
    assert readings is not None
    readings = Readings(**{name: tensor.cpu() for name, tensor in vars(readings).items()})
    rotation = None if directions.is_rotation is None else directions.is_rotation.cpu()
    gates = token_map.gates
    of_tokens = {
        name: None if tensor is None else tensor.cpu()
        for name, tensor in vars(token_map).items()
        if name != "gates"
    }
    if gates is not None:
        gates = Gates(gates.verdicts.cpu(), gates.needed.cpu())
    return Directions(directions.vectors.cpu(), rotation, readings), TokenMap(
        **of_tokens, gates=gates
    )


@pytest.mark.parametrize(
    "backend", [triton_fused, torch_gather, cpu], ids=["triton", "torch", "cpu"]
)
@pytest.mark.parametrize("rotates", [False, True], ids=["add", "rotate"])
@pytest.mark.parametrize("gated", [False, True], ids=["open", "gated"])
@pytest.mark.parametrize(
    ("width", "dtype", "with_residual"),
    [
        (40, torch.float32, True),
        (40, torch.bfloat16, False),
        (4104, torch.float32, False),
        (57, torch.float16, True),
    ],
    ids=str,
)
def test_every_gain_is_that_of_the_equations(
    backend: object,
    rotates: bool,
    gated: bool,
    width: int,
    dtype: torch.dtype,
    with_residual: bool,
    device: torch.device,
) -> None:
    if backend is cpu and device.type != "cpu":
        pytest.skip("the backend of a CPU")
    num_tokens = 9
    directions, token_map = random_case(num_tokens, width, device, rotates=rotates, gated=gated)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(num_tokens, width, generator=generator).to(device, dtype)
    residual = torch.randn(num_tokens, width, generator=generator).to(device, dtype)
    for depth in (1, DOSES):
        out = hidden.clone()
        of_stream = residual if with_residual else None
        backend.steer_tokens_(out, of_stream, directions, 1, token_map, depth)  # type: ignore[attr-defined]
        expected = hidden.cpu().double()
        reference.steer_tokens_(
            expected,
            residual.cpu().double() if with_residual else None,
            *on_host(directions, token_map)[:1],
            1,
            on_host(directions, token_map)[1],
            depth,
        )
        scale = expected.norm(dim=1, keepdim=True).clamp_min(1)
        assert ((out.cpu().double() - expected).abs() <= TOLERANCE[dtype] * scale).all()
        strengths = token_map.strengths[1, :depth]
        if gated:
            assert token_map.gate is not None and token_map.gates is not None
            strengths = strengths * token_map.gates.are_open(token_map.gate[:depth])
        untouched = (strengths == 0).all(0)
        assert torch.equal(out[untouched], hidden[untouched])


@pytest.mark.parametrize("backend", [triton_fused, torch_gather], ids=["triton", "torch"])
@pytest.mark.parametrize("width", [40, 57, 4104])
def test_conditions_write_the_verdicts_of_the_equations(
    backend: object, width: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(width)
    num_tokens, tests = 24, 3
    vectors = torch.randn(LAYERS, 6, width, generator=generator)
    vectors /= vectors.norm(dim=-1, keepdim=True)
    conditions = Conditions(
        vectors.to(device),
        torch.tensor([COSINE, DOT, CAST] * 2, dtype=torch.int32, device=device),
        torch.tensor([1.0] * 3 + [-1.0] * 3, device=device),
        torch.tensor([0.02, 0.5, 0.05] * 2, device=device),
    )
    hidden = torch.randn(num_tokens, width, generator=generator)
    hidden[0] = 0.0
    residual = torch.randn(num_tokens, width, generator=generator)
    residual[0] = 0.0
    which = torch.randint(0, 6, (tests, num_tokens), generator=generator)
    tested = torch.randint(0, 2, (LAYERS, tests, num_tokens), generator=generator)
    cells = 4 + torch.arange(tests * num_tokens).view(tests, num_tokens)

    def verdicts(at: torch.device, run: object, dtype: torch.dtype) -> torch.Tensor:
        gates = Gates(
            torch.zeros(1 + tests * num_tokens // 4, 4, device=at), torch.zeros(19, device=at)
        )
        token_map = TokenMap(
            which.to(at, torch.int32),
            tested.to(at).float(),
            gate=cells.to(at, torch.int32),
            gates=gates,
        )
        here = Conditions(**{name: tensor.to(at) for name, tensor in vars(conditions).items()})
        run.read_conditions_(  # type: ignore[attr-defined]
            hidden.to(at, dtype), residual.to(at, dtype), here, 1, token_map, tests
        )
        return gates.verdicts.view(-1)[4:].cpu()

    expected = verdicts(torch.device("cpu"), reference, torch.float64)
    found = verdicts(device, backend, torch.float32)
    assert torch.equal(found, expected)
    assert 0 < int(expected.sum()) < int((tested[1] != 0).sum())


def test_the_tanh_of_a_condition_has_the_precision_of_float32(device: torch.device) -> None:
    """A threshold between two similarities that differ in the seventh digit still divides them."""
    width = 64
    unit = torch.ones(width, dtype=torch.float64) / 8
    x = unit * 0.3 + torch.linspace(-1e-3, 1e-3, width, dtype=torch.float64)
    y = torch.tanh(float(x @ unit) * unit)
    similarity = float(x @ y / (x.norm() * y.norm()))
    for offset, holds in ((-1e-5, 1.0), (1e-5, 0.0)):
        gates = Gates(torch.zeros(2, 4, device=device), torch.zeros(2, device=device))
        token_map = TokenMap(
            torch.zeros(1, 1, dtype=torch.int32, device=device),
            torch.ones(1, 1, 1, device=device),
            gate=torch.full((1, 1), 4, dtype=torch.int32, device=device),
            gates=gates,
        )
        conditions = Conditions(
            unit.float()[None, None].to(device),
            torch.tensor([CAST], dtype=torch.int32, device=device),
            torch.ones(1, device=device),
            torch.tensor([similarity + offset], device=device),
        )
        row = x.float()[None].to(device)
        triton_fused.read_conditions_(row, None, conditions, 0, token_map, 1)
        assert gates.verdicts[1, 0].item() == holds
