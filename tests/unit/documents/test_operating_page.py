"""The sizes on the page for operators are those of the device tables."""

import re
from pathlib import Path

import pytest
import torch

from vllm_steer import DeltaSteer, LMSteer, VectorSteer
from vllm_steer.bank import fill_head_bank, fill_layer_bank
from vllm_steer.kernels.dispatch import guidance_backend
from vllm_steer.serving.site import SteeredSite

PAGE = (Path(__file__).parents[3] / "docs" / "operating.md").read_text(encoding="utf-8")
HIDDEN, VOCAB = 24, 40
CPU = torch.device("cpu")
MIB = 2**20


def lm_steer(rank: int, columns: int = 2, fixed: tuple[int, ...] = ()) -> LMSteer:
    return LMSteer(
        variant="multiply",
        projector1=torch.ones(columns, HIDDEN, rank),
        projector2=torch.ones(columns, HIDDEN, rank),
        epsilon=1.0,
        hidden_size=HIDDEN,
        fixed_columns=fixed,
    )


def head_bytes(steer: LMSteer, dtype: torch.dtype) -> int:
    return fill_head_bank({"a": steer}, dtype=dtype, device=CPU).num_bytes


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
@pytest.mark.parametrize(
    ("steer", "numbers"),
    [
        (lm_steer(3), 2 * 6 * HIDDEN),
        (lm_steer(5, fixed=(1,)), 2 * 10 * HIDDEN),
        (lm_steer(20), HIDDEN * HIDDEN),
        (lm_steer(20, fixed=(1,)), 2 * HIDDEN * HIDDEN),
        (LMSteer(variant="add", add=torch.ones(1, HIDDEN), epsilon=1, hidden_size=HIDDEN), HIDDEN),
        (
            LMSteer(
                variant="offset",
                offset=torch.ones(2, VOCAB),
                epsilon=1,
                hidden_size=HIDDEN,
                fixed_columns=(1,),
            ),
            2 * VOCAB,
        ),
    ],
    ids=["low-rank", "fixed-column", "high-rank", "high-rank-fixed", "add", "offset-fixed"],
)
def test_an_lm_steer_takes_what_the_page_says(
    steer: LMSteer, numbers: int, dtype: torch.dtype, size: int
) -> None:
    assert head_bytes(steer, dtype) == numbers * size


def test_directions_and_token_map_take_what_the_page_says() -> None:
    steers = {
        "v": VectorSteer(vectors=torch.ones(2, HIDDEN), layers=(1, 2)),
        "w": VectorSteer(vectors=torch.ones(2, HIDDEN), layers=(2, 5)),
    }
    bank = fill_layer_bank(steers, layers=range(8), device=CPU, project=lambda _, rows: rows)
    assert bank.num_bytes == 3 * (1 + 2) * HIDDEN * 4
    delta = DeltaSteer(delta=torch.ones(7, 2, HIDDEN), layers=(0, 1))
    at_heads = fill_layer_bank(
        {"d": delta}, layers=range(8), device=CPU, project=lambda _, rows: rows
    )
    assert at_heads.num_bytes == 2 * (1 + 7) * HIDDEN * 4
    (table,) = bank.tables
    site = SteeredSite(
        table, guidance_backend("torch", CPU), max_doses=4, max_tokens=64, device=CPU
    )
    assert site.num_bytes == 64 * 4 * (1 + 3) * 4


def test_the_example_of_the_page_is_worked_out_by_its_formulas() -> None:
    text = " ".join(PAGE.split())
    hidden, layers, bfloat16, float32 = 4096, 32, 2, 4
    lm_steers = 8 * 2 * (1024 + 1) * hidden * bfloat16
    directions = layers * (1 + 32 + 64) * hidden * float32
    token_map = 8192 * 4 * (1 + layers) * float32
    sizes = [round(size / MIB) for size in (lm_steers, directions, token_map)]
    found = re.search(r"(\d+) MiB for LM-Steers, .* (\d+) MiB for directions, .* (\d+) MiB", text)
    assert found and [int(size) for size in found.groups()] == sizes
