"""Equal first, then timed: what has to hold before and after a measurement."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.decode import Leg, run_leg
from benchmarks.dummy_model import STRENGTH, Shape
from benchmarks.rounds import Round, plain_legs

CHECK_STEPS = 4


def check_operation(
    paths: Mapping[str, Path], shape: Shape, dtype: torch.dtype, *, max_rows: int
) -> None:
    """The form that the engine runs against the written-out reference, on these steers."""
    from vllm_steer import load_steer
    from vllm_steer.bank import fill_head_bank
    from vllm_steer.doses import Dose
    from vllm_steer.kernels.dispatch import lm_steer_form
    from vllm_steer.kernels.lm_steer import reference
    from vllm_steer.serving.pairs import Uses, steered_rows
    from vllm_steer.serving.rows import BatchRows, SteeredRequest

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steers = {name: load_steer(paths[name]) for name in sorted(paths)[:2]}
    shelf = fill_head_bank(steers, dtype=dtype, device=device).hidden
    assert shelf is not None
    rows = BatchRows([*steers, "unsteered"], np.array([2, 1, 1]))
    requests = {name: SteeredRequest((Dose(name, STRENGTH),), prompt_len=1) for name in steers}
    steered = steered_rows(rows, Uses(shelf, requests))
    assert steered is not None
    used = int(steered.rows.max()) + 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows.num_rows, shape.hidden_size, generator=generator).to(device, dtype)
    form = lm_steer_form("auto", device, max_rows=max_rows)
    found = form.steer_rows(x, shelf.tables, form.place(steered, shelf.tables, device))
    wanted = reference.steer_rows(x, shelf.tables, steered)
    tolerance = 16 * torch.finfo(dtype).eps * float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    assert torch.equal(found[used:], x[used:]), "a row without a steer was changed"
    assert not torch.isclose(found[:used], x[:used]).all(1).any(), "a steered row was not changed"


def check_guidance(path: Path, shape: Shape, dtype: torch.dtype) -> None:
    """The form that the engine runs against the written-out reference, on this steer."""
    from vllm_steer import load_steer
    from vllm_steer.bank import fill_layer_bank
    from vllm_steer.kernels.dispatch import guidance_form
    from vllm_steer.kernels.guidance import TokenMap, reference

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bank = fill_layer_bank(
        {"s": load_steer(path)}, layers=range(shape.layers), device=device, project=_no_heads
    )
    (shelf,) = bank.shelves
    strengths = torch.tensor([0.0, STRENGTH, -1.5], device=device).expand(shape.layers, 1, 3)
    token_map = TokenMap(torch.tensor([[0, 1, 1]], dtype=torch.int32, device=device), strengths)
    x = torch.randn(3, shape.hidden_size, generator=torch.Generator().manual_seed(0))
    found, wanted = (x.to(device, dtype, copy=True) for _ in range(2))
    for form, hidden in ((guidance_form("auto", device), found), (reference, wanted)):
        form.steer_tokens_(hidden, None, shelf.directions, 1, token_map, 1)
    tolerance = 4 * torch.finfo(dtype).eps * float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    assert torch.equal(found[0], x[0].to(found)), "a token without a dose was changed"
    assert not torch.isclose(found[1:], x[1:].to(found)).all(1).any(), "a token was not changed"


def _no_heads(layer: int, rows: torch.Tensor) -> torch.Tensor:
    raise AssertionError(f"layer {layer} has no heads here: {rows.shape}")


def check_engine(llm: Any, steers: Sequence[str | None], shape: Shape) -> None:
    """Rows with a steer change; in one batch with them the others keep every token and logprob.

    Log probabilities and not tokens show the change: under dummy weights, which vLLM draws from
    one seed for every tensor, the likeliest token can be the same whatever the hidden state.
    """
    plain, mixed = (
        run_leg(llm, asked, CHECK_STEPS, shape.vocab_size, logprobs=True)
        for asked in ([None] * len(steers), steers)
    )
    for row, steer in enumerate(steers):
        tokens_kept = plain.tokens[row] == mixed.tokens[row]
        kept = tokens_kept and plain.logprobs[row] == mixed.logprobs[row]
        if steer is None:
            assert kept, f"unsteered row {row} of {len(steers)} was changed by its neighbours"
        else:
            assert not kept, f"row {row} of {len(steers)} was not changed by its steer {steer}"


def check_legs(rounds: Sequence[Round[Leg]], *, steered: bool) -> None:
    """Legs of one kind gave one output; without steers both kinds gave the same."""
    plain = {leg.tokens for leg in plain_legs(rounds)}
    other = {one.other.tokens for one in rounds}
    assert len(plain) == len(other) == 1, "legs of one kind gave different tokens"
    assert steered or plain == other, "two engines without steered rows gave different tokens"
