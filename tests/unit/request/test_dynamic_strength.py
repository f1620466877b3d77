"""The strength of Dynamic Activation Composition, against loops over one row in float64."""

import itertools
import math

import pytest
import torch

from vllm_steer import SteerError
from vllm_steer.dynamic import KLS, dynamic_strength, strength
from vllm_steer.kernels.divergence import cpu, torch_sort

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True, params=[cpu, torch_sort], ids=["host", "device"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both backends on the host: the device's is plain torch."""
    monkeypatch.setattr(strength, "divergence_backend", lambda kernels, device: request.param)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = sum(math.exp(value - top) for value in row)
    return [math.exp(value - top) / total for value in row]


def likeliest(p: list[float], top_p: float) -> set[int]:
    """Token by token until the cumulative probability exceeds top_p, that token included."""
    chosen: set[int] = set()
    total = 0.0
    for token in sorted((v for v in range(len(p)) if p[v] > 0), key=lambda token: -p[token]):
        chosen.add(token)
        total += p[token]
        if total > top_p:
            break
    return chosen


def expected(base: list[float], probe: list[float], top_p: float, kl: str) -> float:
    p0, p1 = softmax(base), softmax(probe)
    union = likeliest(p0, top_p) | likeliest(p1, top_p)
    mass0, mass1 = sum(p0[v] for v in union), sum(p1[v] for v in union)
    if any(p0[v] > 0 and p1[v] == 0 for v in union):
        return INF
    both = [v for v in union if p0[v] > 0]
    total = sum(p0[v] / mass0 * math.log((p0[v] / mass0) / (p1[v] / mass1)) for v in both)
    return total / len(union) if kl == "authors" else total


def rows(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def log(*p: float) -> torch.Tensor:
    return torch.tensor(p, dtype=torch.float64).log()


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("top_p", [0.4, 0.5, 0.7, 0.95])
def test_the_divergence_of_each_row_follows_the_equation(kl: str, top_p: float) -> None:
    base, probe = rows(3, 5, 37), rows(3, 5, 37, seed=1)
    strength, divergence = dynamic_strength(base, probe, top_p=top_p, kl=kl)
    expected_values = [
        [expected(b.tolist(), p.tolist(), top_p, kl) for b, p in zip(bs, ps, strict=True)]
        for bs, ps in zip(base, probe, strict=True)
    ]
    torch.testing.assert_close(divergence, torch.tensor(expected_values, dtype=torch.float64))
    torch.testing.assert_close(
        strength, torch.tensor(expected_values, dtype=torch.float64).clamp(0, 2)
    )


def test_the_divergence_is_of_the_unsteered_from_the_steered_distribution() -> None:
    p0, p1 = (0.7, 0.3), (0.4, 0.6)
    _, divergence = dynamic_strength(log(*p0), log(*p1), top_p=0.99)
    assert divergence.item() == pytest.approx(0.7 * math.log(7 / 4) + 0.3 * math.log(1 / 2))


def test_the_authors_divide_by_the_size_of_the_union() -> None:
    base, probe = log(0.5, 0.3, 0.1, 0.1), log(0.1, 0.2, 0.65, 0.05)
    plain = dynamic_strength(base, probe, top_p=0.6)[1]
    authors = dynamic_strength(base, probe, top_p=0.6, kl="authors")[1]
    assert (plain / authors).item() == pytest.approx(3)  # {0, 1} and {2}


def test_the_union_has_the_token_that_crosses_top_p() -> None:
    # 0.5 does not exceed 0.6: token 1 crosses and belongs to the union, token 2 does not.
    p0, p1 = (0.5, 0.3, 0.2), (0.3, 0.5, 0.2)
    _, divergence = dynamic_strength(log(*p0), log(*p1), top_p=0.6)
    expected = 5 / 8 * math.log(5 / 3) + 3 / 8 * math.log(3 / 5)
    assert divergence.item() == pytest.approx(expected)


def test_a_sum_equal_to_top_p_takes_one_more_token() -> None:
    p0, p1 = (0.5, 0.25, 0.25), (0.5, 0.375, 0.125)
    _, divergence = dynamic_strength(log(*p0), log(*p1), top_p=0.5)
    expected = 2 / 3 * math.log((2 / 3) / (4 / 7)) + 1 / 3 * math.log((1 / 3) / (3 / 7))
    assert divergence.item() == pytest.approx(expected)


def test_the_same_single_likely_token_gives_zero() -> None:
    strength, _ = dynamic_strength(log(0.9, 0.05, 0.05), log(0.8, 0.1, 0.1), top_p=0.5)
    assert strength.item() == 0


def test_equal_distributions_give_zero_and_nothing_negative() -> None:
    logits = rows(64, 101).float()
    strength, divergence = dynamic_strength(logits, logits + 3, top_p=0.95)
    assert divergence.abs().max() < 1e-5
    assert (strength >= 0).all()


def test_the_strength_is_capped_at_the_maximum_and_the_divergence_is_not() -> None:
    base, probe = log(0.98, 0.02), log(0.001, 0.999)
    strength, divergence = dynamic_strength(base, probe, top_p=0.5, maximum=1.5)
    assert strength.item() == 1.5
    assert divergence.item() > 5


def test_a_token_that_the_probe_rules_out_gives_the_maximum() -> None:
    base, probe = log(0.5, 0.5), torch.tensor([-torch.inf, 0.0])
    assert dynamic_strength(base.float(), probe, top_p=0.9)[0].item() == 2


def test_a_token_that_the_unsteered_model_rules_out_adds_nothing() -> None:
    base, probe = torch.tensor([0.0, -torch.inf, -torch.inf]), log(0.5, 0.5, 0.0).float()
    _, divergence = dynamic_strength(base, probe, top_p=0.9)
    assert divergence.item() == pytest.approx(math.log(2))


def test_bfloat16_logits_are_computed_in_float32() -> None:
    base, probe = rows(4, 61).bfloat16(), rows(4, 61, seed=1).bfloat16()
    _, result = dynamic_strength(base, probe, top_p=0.7)
    _, expected = dynamic_strength(base.double(), probe.double(), top_p=0.7)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected.float(), rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_other_rows() -> None:
    base, probe = rows(5, 43), rows(5, 43, seed=1)
    together = dynamic_strength(base, probe, top_p=0.6)[1]
    alone = torch.stack(
        [dynamic_strength(b, p, top_p=0.6)[1] for b, p in zip(base, probe, strict=True)]
    )
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-15)


@pytest.mark.parametrize("settings", ["numbers", "tensors"])
def test_no_value_is_read_back_from_the_device(
    settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strength, "divergence_backend", lambda kernels, device: torch_sort)
    # Tensors without values: whatever needs one, a shape too, fails on them.
    logits = torch.empty(3, 4, 50, device="meta", dtype=torch.bfloat16)
    per_row = torch.empty(3, 4, device="meta")
    fields: dict[str, object] = {"top_p": 0.5, "kl": "authors"}
    if settings == "tensors":
        fields = {"top_p": per_row, "maximum": per_row, "kl": per_row.bool()}
    result, divergence = dynamic_strength(logits, logits, **fields)
    assert result.shape == divergence.shape == (3, 4)
    assert result.dtype == torch.float32


def test_finding_the_base_of_a_probe_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strength, "divergence_backend", lambda kernels, device: torch_sort)
    base, probe = (torch.empty(rows, 50, device="meta") for rows in (2, 5))
    base_of = torch.empty(5, device="meta", dtype=torch.int64)
    result, divergence = dynamic_strength(base, probe, top_p=0.5, base_of=base_of)
    assert result.shape == divergence.shape == (5,)


def test_every_row_may_have_settings_of_its_own() -> None:
    base, probe = rows(6, 37), rows(6, 37, seed=1)
    top_ps, maxima = [0.4, 0.5, 0.95, 1.0, 0.7, 0.2], [0.01, 2.0, 0.5, 9.0, 0.25, 1e-3]
    authors = [False, True, True, False, True, False]
    strength, divergence = dynamic_strength(
        base,
        probe,
        top_p=torch.tensor(top_ps, dtype=torch.float64),
        maximum=torch.tensor(maxima, dtype=torch.float64),
        kl=torch.tensor(authors),
    )
    expected_values = [
        expected(base[i].tolist(), probe[i].tolist(), top_ps[i], "authors" if divided else "plain")
        for i, divided in enumerate(authors)
    ]
    torch.testing.assert_close(divergence, torch.tensor(expected_values, dtype=torch.float64))
    clipped = [
        min(max(kl, 0.0), maximum) for kl, maximum in zip(expected_values, maxima, strict=True)
    ]
    torch.testing.assert_close(strength, torch.tensor(clipped, dtype=torch.float64))
    assert {min(c, m) == m for c, m in zip(clipped, maxima, strict=True)} == {True, False}


def test_settings_broadcast_to_the_rows() -> None:
    base, probe = rows(2, 3, 37).float(), rows(2, 3, 37, seed=1).float()
    by_column, by_row = torch.tensor([0.4, 0.7, 0.9]), torch.tensor([[0.1], [3.0]])
    strength, divergence = dynamic_strength(
        base, probe, top_p=by_column, maximum=by_row, kl=torch.tensor(True)
    )
    for i, j in itertools.product(range(2), range(3)):
        kl = expected(base[i, j].tolist(), probe[i, j].tolist(), float(by_column[j]), "authors")
        assert divergence[i, j].item() == pytest.approx(kl, rel=1e-4)
        assert strength[i, j].item() == pytest.approx(min(kl, float(by_row[i])), rel=1e-4)
    assert strength.dtype == divergence.dtype == torch.float32


def test_several_probes_of_one_base_equal_single_probes() -> None:
    base, probe = rows(3, 41), rows(5, 41, seed=1)
    base_of, top_p = [2, 0, 0, 2, 2], [0.5, 0.9, 0.3, 0.5, 1.0]
    strength, divergence = dynamic_strength(
        base,
        probe,
        base_of=torch.tensor(base_of),
        top_p=torch.tensor(top_p, dtype=torch.float64),
        maximum=torch.full((5,), 0.5, dtype=torch.float64),
    )
    expected_values = torch.tensor(
        [
            expected(base[row].tolist(), probe[i].tolist(), top_p[i], "plain")
            for i, row in enumerate(base_of)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(divergence, expected_values)
    torch.testing.assert_close(strength, expected_values.clamp(0, 0.5))


@pytest.mark.parametrize("num_base", [0, 2])
def test_zero_probes_are_allowed(num_base: int) -> None:
    base_of = torch.empty(0, dtype=torch.int64)
    result = dynamic_strength(rows(num_base, 7), rows(0, 7), top_p=0.5, base_of=base_of)
    assert [tensor.shape for tensor in result] == [(0,), (0,)]


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("top_p", [0.5, 0.95, 1.0])
def test_a_padded_vocabulary_gives_the_same_result(kl: str, top_p: float) -> None:
    """Also at ``top_p`` 1, where every token counts, and only those that are there."""
    base, probe = rows(4, 37), rows(4, 37, seed=1)
    result = dynamic_strength(
        *(torch.nn.functional.pad(x, (0, 27), value=-INF) for x in (base, probe)),
        top_p=top_p,
        kl=kl,
    )
    expected = dynamic_strength(base, probe, top_p=top_p, kl=kl)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("top_p", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("masked", ["base", "probe", "both", "each-its-own"])
def test_ruled_out_tokens_follow_the_equation(masked: str, top_p: float, kl: str) -> None:
    base, probe = rows(5, 23, scale=1.0), rows(5, 23, seed=1, scale=1.0)
    if masked != "probe":
        base[:, 2:9] = -INF
    if masked != "base":
        probe[:, slice(2, 9) if masked == "both" else slice(7, 15)] = -INF
    strength, divergence = dynamic_strength(base, probe, top_p=top_p, kl=kl)
    expected_values = torch.tensor(
        [expected(b.tolist(), p.tolist(), top_p, kl) for b, p in zip(base, probe, strict=True)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(divergence, expected_values)
    torch.testing.assert_close(strength, expected_values.clamp(0, 2))
    if masked in ("base", "both"):
        assert expected_values.isfinite().all()


@pytest.mark.parametrize("side", ["base", "probe", "both"])
@pytest.mark.parametrize("spoilt", [[NAN], [INF], [-INF] * 11], ids=["nan", "inf", "no-token"])
@pytest.mark.parametrize("kl", KLS)
def test_an_invalid_row_gives_nan_and_does_not_affect_other_rows(
    kl: str, spoilt: list[float], side: str
) -> None:
    base, probe = rows(4, 11).float(), rows(4, 11, seed=1).float()
    clean = dynamic_strength(base, probe, top_p=0.6, kl=kl)
    for name, logits in (("base", base), ("probe", probe)):
        if side in (name, "both"):
            logits[2, : len(spoilt)] = torch.tensor(spoilt)
    result = dynamic_strength(base, probe, top_p=0.6, kl=kl)
    valid_rows = [0, 1, 3]
    for before, after in zip(clean, result, strict=True):
        assert torch.equal(after[valid_rows], before[valid_rows])
        assert after[2].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_divergence_is_exactly_zero_where_only_one_token_is_likely(
    dtype: torch.dtype,
) -> None:
    base, probe = rows(50, 99), rows(50, 99, seed=1)
    base[:, 7], probe[:, 7] = 12 + base[:, 7], 12 + probe[:, 7]
    strength, divergence = dynamic_strength(base.to(dtype), probe.to(dtype), top_p=0.5)
    assert (strength == 0).all() and (divergence == 0).all()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.3, 3.0])
@pytest.mark.parametrize("vocab_size", [64, 65, 700])
def test_a_distribution_of_any_breadth_follows_the_equation(
    vocab_size: int, scale: float, top_p: float
) -> None:
    """Equal logits too, at the border of what is likely and everywhere."""
    base, probe = (rows(3, vocab_size, seed=seed, scale=scale) for seed in (0, 1))
    base[1] = (base[1] * 3).round() / 3
    probe[2] = probe[2].round()
    probe[0, ::7] = -INF
    _, divergence = dynamic_strength(base, probe, top_p=top_p, kl="authors")
    expected_values = [
        expected(b.tolist(), p.tolist(), top_p, "authors") for b, p in zip(base, probe, strict=True)
    ]
    torch.testing.assert_close(divergence, torch.tensor(expected_values, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_top_p_1_takes_every_token_of_a_sharp_distribution(dtype: torch.dtype) -> None:
    base, probe = (rows(20, 3000, seed=seed, scale=20.0).to(dtype) for seed in (0, 1))
    base[:, ::3] = probe[:, ::3] = -INF
    for top_p in (1.0, torch.ones(20)):
        plain, divided = (
            dynamic_strength(base, probe, top_p=top_p, kl=kl)[1] for kl in ("plain", "authors")
        )
        torch.testing.assert_close(plain / divided, torch.full_like(plain, 2000.0))


def test_ties_select_the_lower_token_id() -> None:
    """Of four alike, two cross 0.3: the first two of each side, whatever the other's order."""
    base, probe = log(0.25, 0.25, 0.25, 0.25), log(0.4, 0.2, 0.2, 0.2)
    _, divergence = dynamic_strength(base, probe, top_p=0.3)
    expected = 0.5 * math.log(0.5 / (2 / 3)) + 0.5 * math.log(0.5 / (1 / 3))
    assert divergence.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be above 0 and at most 1"),
        ({"maximum": 0.0}, "maximum is 0.0; it must be above 0"),
        ({"maximum": math.nan}, "maximum is nan; it must be above 0"),
        (
            {"kl": torch.ones(2)},
            "kl is a tensor of torch.float32; expected bool (true: divide by |Q| as the authors "
            "do)",
        ),
        ({"kl": "reverse"}, "kl is 'reverse'; allowed: plain, authors"),
    ],
)
def test_a_wrong_setting_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SteerError) as raised:
        dynamic_strength(rows(2, 7), rows(2, 7), **{"top_p": 0.5, **fields})
    assert str(raised.value) == message


def test_logits_of_different_shapes_are_refused() -> None:
    with pytest.raises(SteerError, match=r"are \[2, 7\], the probe's \[2, 8\]; they must be equal"):
        dynamic_strength(rows(2, 7), rows(2, 8), top_p=0.5)


@pytest.mark.parametrize(
    ("base", "probe", "base_of"),
    [((2, 7), (3, 7), (2,)), ((2, 7), (3, 8), (3,)), ((2, 2, 7), (3, 7), (3,))],
    ids=["another-number", "other-vocabularies", "bases-in-two-dimensions"],
)
def test_bases_that_do_not_belong_to_the_probes_are_refused(
    base: tuple[int, ...], probe: tuple[int, ...], base_of: tuple[int, ...]
) -> None:
    with pytest.raises(SteerError) as raised:
        dynamic_strength(
            rows(*base), rows(*probe), top_p=0.5, base_of=torch.zeros(base_of, dtype=torch.int64)
        )
    assert str(raised.value) == (
        f"unsteered logits are {list(base)}, the probes' {list(probe)}, base_of {list(base_of)}; "
        "they must be [R, V], [D, V] and [D]"
    )
