"""The reference of dynamic strengths, against a two-layer model in numpy and sums done by hand."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "engine"))
import reference
from dynamic_reference import divergence_over_likeliest, reference_generate
from engines import guidance_steers, random_steers
from reference import Modules, guided_logprobs, load_reference
from tiny_models import HIDDEN, VOCAB, save_tiny_model

from vllm_steer import DeltaSteer, LMSteer, Steer, VectorSteer
from vllm_steer.doses import Dose, Dynamic

WIDTH, WORDS, STEPS = 6, 9, 5
PROMPT = [3, 7, 1]
FIRST = len(PROMPT) - 1

Array = np.ndarray[Any, np.dtype[np.float64]]


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


EMBEDDING = normal(WORDS, WIDTH, seed=1)
OUTPUT = normal(2, WIDTH, WIDTH, seed=2)


class RunningMean(torch.nn.Module):
    """A minimal attention: each position is the mean of all positions up to it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.o_proj = torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        self.o_proj.weight.data = weight

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return self.o_proj(x.cumsum(1) / count), None


class Block(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.input_layernorm = torch.nn.Tanh()
        self.self_attn = RunningMean(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.self_attn(self.input_layernorm(x))[0]


class Body(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block(weight) for weight in OUTPUT)

    def forward(self, ids: torch.Tensor, use_cache: bool) -> Any:
        x = EMBEDDING[ids]
        for block in self.layers:
            x = block(x)
        return SimpleNamespace(last_hidden_state=x)


class Toy(torch.nn.Module):
    """Hugging Face's names around two blocks and a tied head."""

    config = SimpleNamespace()

    def __init__(self) -> None:
        super().__init__()
        self.model = Body()

    @property
    def base_model(self) -> Body:
        return self.model

    def get_output_embeddings(self) -> Any:
        return SimpleNamespace(weight=EMBEDDING)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.setitem(reference.MODULES, "Toy", Modules())
    return Toy()


def delta(site: Any, seed: int, *, steps: int = STEPS, layers: tuple[int, ...] = (0, 1)) -> Steer:
    values = normal(steps, len(layers), WIDTH, seed=seed, scale=0.6)
    return DeltaSteer(delta=values, layers=layers, site=site)


def vector(site: Any, mode: Any, seed: int) -> Steer:
    return VectorSteer(vectors=normal(2, WIDTH, seed=seed), layers=(0, 1), site=site, mode=mode)


STEERS: dict[str, Steer] = {
    "heads": delta("heads", 11),
    "resid": delta("resid", 12, layers=(1,)),
    "inner": delta("attn_in", 13),
    "outer": delta("attn_out", 14),
    "short": delta("resid", 15, steps=2),
    "push": vector("resid", "add", 16),
    "turn": vector("attn_in", "rotate", 17),
    "spin": vector("resid", "rotate", 18),
    "lens": LMSteer(
        variant="multiply",
        projector1=normal(2, WIDTH, 3, seed=19),
        projector2=normal(2, WIDTH, 3, seed=20),
        epsilon=0.05,
        hidden_size=WIDTH,
        fixed_columns=(1,),
    ),
    "bias": LMSteer(variant="add", add=normal(1, WIDTH, seed=21), epsilon=0.2, hidden_size=WIDTH),
    "tilt": LMSteer(
        variant="offset", offset=normal(1, WORDS, seed=22), epsilon=0.4, hidden_size=WIDTH
    ),
}

Take = tuple[str, float | Sequence[float]]
"""A steer's name and its strength at each step, the same one or one each."""


def numpy_logits(ids: Sequence[int], takes: Sequence[Take]) -> Array:
    """The logits of the last position, position by position in numpy."""
    x = EMBEDDING.numpy()[list(ids)]
    for layer in (0, 1):
        inner = numpy_steered(np.tanh(x), "attn_in", layer, takes)
        means = np.stack([inner[: t + 1].mean(axis=0) for t in range(len(ids))])
        means = numpy_steered(means, "heads", layer, takes)
        outer = numpy_steered(means @ OUTPUT[layer].numpy().T, "attn_out", layer, takes)
        x = numpy_steered(x + outer, "resid", layer, takes)
    return numpy_head(x[-1], takes, len(ids) - 1 - FIRST)


def strength_at(strength: float | Sequence[float], step: int) -> float:
    return float(strength) if isinstance(strength, int | float) else strength[step]


def numpy_steered(x: Array, site: str, layer: int, takes: Sequence[Take]) -> Array:
    result = x.copy()
    for t in range(FIRST, len(x)):
        rotates = False
        for name, strength in takes:
            steer = STEERS[name]
            a = strength_at(strength, t - FIRST)
            if steer.site != site or a == 0 or layer not in steer.layers:
                continue
            row = steer.layers.index(layer)
            if isinstance(steer, DeltaSteer):
                if t - FIRST < steer.steps:
                    result[t] += a * steer.delta[t - FIRST, row].numpy()
            elif steer.mode == "add":
                result[t] += a * steer.vectors[row].numpy()
            else:
                w = steer.vectors[row].numpy()
                result[t] += a * w / math.sqrt(sum(w * w))
                rotates = True
        if rotates:
            result[t] *= math.sqrt(sum(x[t] * x[t])) / math.sqrt(sum(result[t] * result[t]))
    return result


def numpy_head(h: Array, takes: Sequence[Take], step: int) -> Array:
    changed, offset = h.copy(), np.zeros(WORDS)
    for name, strength in takes:
        a = strength_at(strength, step)
        if a == 0:
            continue
        if name == "lens":
            p1, p2 = (STEERS[name].tensors[key].numpy() for key in ("projector1", "projector2"))
            changed += 0.05 * (a * p2[0] @ (p1[0].T @ h) + 1.0 * p2[1] @ (p1[1].T @ h))
        elif name == "bias":
            changed += 0.2 * a * STEERS[name].add[0].numpy()
        elif name == "tilt":
            offset += 0.4 * a * STEERS[name].offset[0].numpy()
    return EMBEDDING.numpy() @ changed + offset


def numpy_softmax(logits: Array) -> Array:
    exponents = np.exp(logits - logits.max())
    return exponents / exponents.sum()


def numpy_strength(p0: Array, pj: Array, maximum: float, top_p: float, kl: str) -> float:
    q: set[int] = set()
    for p in (p0, pj):
        total = 0.0
        for token in sorted(range(WORDS), key=lambda token, p=p: -p[token]):
            q.add(token)
            total += p[token]
            if total > top_p:
                break
    mass0, massj = sum(p0[v] for v in q), sum(pj[v] for v in q)
    divergence = sum(p0[v] / mass0 * math.log(p0[v] / mass0 / (pj[v] / massj)) for v in q)
    if kl == "authors":
        divergence /= len(q)
    return math.copysign(min(max(divergence, 0.0), abs(maximum)), maximum)


def numpy_generate(
    dynamic: Sequence[Dose], fixed: Sequence[Take], count: int
) -> tuple[list[int], dict[str, list[float]]]:
    """One token after another: base, probes, strengths, main stream, choice."""
    tokens: list[int] = []
    strengths: dict[str, list[float]] = {dose.steer: [] for dose in dynamic}
    for step in range(count):
        ids = PROMPT + tokens
        p0 = numpy_softmax(numpy_logits(ids, []))
        for dose in dynamic:
            ended = step >= (STEERS[dose.steer].steps or count)
            pj = numpy_softmax(numpy_logits(ids, [(dose.steer, dose.strength)]))
            options = dose.strength, dose.dynamic.top_p, dose.dynamic.kl
            strengths[dose.steer].append(0.0 if ended else numpy_strength(p0, pj, *options))
        tokens.append(int(numpy_logits(ids, [*strengths.items(), *fixed]).argmax()))
    return tokens, strengths


def dynamic(name: str, maximum: float = 2.0, top_p: float = 0.5, kl: Any = "plain") -> Dose:
    return Dose(name, maximum, phase="answer", dynamic=Dynamic(top_p, kl))


CASES: dict[str, tuple[list[Dose], list[Take]]] = {
    **{f"one-{name}": ([dynamic(name, 1.5, 0.7)], []) for name in STEERS},
    "negative-maximum": ([dynamic("heads", -1.5, 0.8)], []),
    "negative-maximum-of-a-rotation": ([dynamic("spin", -2.0, 0.8)], []),
    "authors": ([dynamic("heads", 2.0, 0.9, "authors")], []),
    "small-maximum": ([dynamic("push", 0.1, 0.9)], []),
    "two-deltas": ([dynamic("heads", 2.0, 0.8), dynamic("outer", 1.0, 0.6)], []),
    "two-that-rotate": ([dynamic("turn", 2.0, 0.9), dynamic("spin", 2.0, 0.9)], []),
    "three-kinds": ([dynamic("resid", 2, 0.7), dynamic("spin", 2, 0.8), dynamic("lens", 3)], []),
    "three-at-one-site": ([dynamic("resid"), dynamic("push", 1, 0.9), dynamic("spin", -1)], []),
    "beside-a-fixed-delta": ([dynamic("heads", 2, 0.8)], [("inner", 1.5)]),
    "beside-fixed-ones-at-the-head": ([dynamic("push", 1, 0.8)], [("lens", 2.0), ("tilt", -1.0)]),
    "at-the-head-beside-a-fixed-delta": ([dynamic("lens", 4, 0.9)], [("resid", 1.0)]),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_strengths_equal_a_loop_in_numpy(toy: Toy, case: str) -> None:
    doses, fixed = CASES[case]
    tokens, strengths = numpy_generate(doses, fixed, STEPS)
    all_doses = [*doses, *(Dose(name, float(strength)) for name, strength in fixed)]
    trace = reference_generate(toy, PROMPT, all_doses, STEERS, max_tokens=STEPS)
    assert trace.tokens == tokens == trace.choices
    assert trace.strengths.keys() == strengths.keys()
    for name in strengths:
        assert trace.strengths[name] == pytest.approx(strengths[name], abs=1e-12)


def test_the_cases_have_strengths_of_every_sort() -> None:
    strengths = [
        (value, dose.strength)
        for doses, fixed in CASES.values()
        for dose in doses
        for value in numpy_generate(doses, fixed, STEPS)[1][dose.steer]
    ]
    assert any(value == 0 for value, _ in strengths)
    assert any(value == maximum for value, maximum in strengths)
    assert any(0 < value < maximum for value, maximum in strengths)
    assert any(maximum < value < 0 for value, maximum in strengths)


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_divergence_over_a_union_of_three_by_hand() -> None:
    p0, pj = rows(0.5, 0.3, 0.1, 0.1), rows(0.1, 0.2, 0.65, 0.05)
    # top(p0) = {0, 1}, for 0.5 does not exceed 0.6; top(pj) = {2}.
    expected = 5 / 9 * math.log(50 / 9 * 0.95) + 3 / 9 * math.log(15 / 9 * 0.95)
    expected += 1 / 9 * math.log(0.95 / (9 * 0.65))
    divergence, boundary = divergence_over_likeliest(p0, pj, 0.6, by_size=False)
    assert divergence == pytest.approx(expected)
    assert boundary == pytest.approx(0.05)  # 0.65 is next to 0.6
    assert divergence_over_likeliest(p0, pj, 0.6, by_size=True)[0] == pytest.approx(expected / 3)


def test_a_boundary_is_near_if_a_sum_or_an_order_is_close() -> None:
    same = rows(0.6, 0.2, 0.1999, 0.0001)
    assert divergence_over_likeliest(same, same, 0.7, by_size=False)[1] == pytest.approx(0.0001)
    assert divergence_over_likeliest(same, same, 0.59, by_size=False)[1] == pytest.approx(0.01)


def test_a_sum_equal_to_top_p_takes_one_more_token() -> None:
    p0, pj = rows(0.5, 0.25, 0.25), rows(0.5, 0.375, 0.125)
    divergence, boundary = divergence_over_likeliest(p0, pj, 0.5, by_size=False)
    assert divergence == pytest.approx(2 / 3 * math.log(7 / 6) + 1 / 3 * math.log(7 / 9))
    assert boundary == 0


Generate = Callable[..., Any]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_reference(save_tiny_model("llama", tmp_path_factory.mktemp("llama"), num_layers=3))


LLAMA_STEERS: dict[str, Steer] = {
    **guidance_steers(HIDDEN, 3, HIDDEN),
    **random_steers(HIDDEN, VOCAB),
}
IDS = [7, 300, 41, 96]
THREE = [dynamic("steps", 2, 0.8), dynamic("turn", 3, 0.6), dynamic("dummy", 4, 0.9)]


@pytest.fixture(scope="module")
def generate(llama: Any) -> Generate:
    def run(*doses: Dose, **options: Any) -> Any:
        return reference_generate(llama, IDS, doses, LLAMA_STEERS, **options)

    return run


def test_without_dynamic_doses_it_equals_the_reference_of_the_other_tests(
    llama: Any, generate: Generate
) -> None:
    doses = [
        Dose("steps", 2.0, schedule="dim"),
        Dose("walk", -1.0, phase="prompt", schedule="start"),
        Dose("turn", 3.0, phase="generation", layers=(0, 2)),
        Dose("dummy", 2.0),
        Dose("tilt", -1.0),
    ]
    trace = generate(*doses, max_tokens=8)
    text = IDS + trace.tokens[:-1]
    expected = guided_logprobs(llama, text, len(IDS), doses, LLAMA_STEERS)[len(IDS) - 1 :]
    torch.testing.assert_close(trace.logprobs, expected)


@pytest.mark.parametrize("name", ["steps", "walk"])
def test_a_delta_always_at_its_maximum_equals_a_fixed_one(llama: Any, name: str) -> None:
    steer = LLAMA_STEERS[name]
    strong: dict[str, Steer] = {name: replace(steer, delta=500 * steer.delta)}
    trace = reference_generate(llama, IDS, [dynamic(name, -0.01, 0.99)], strong, max_tokens=4)
    assert trace.strengths[name] == [-0.01] * 4
    fixed = Dose(name, -0.01, schedule="fixed")
    expected = guided_logprobs(llama, IDS + trace.tokens[:-1], len(IDS), [fixed], strong)
    torch.testing.assert_close(trace.logprobs, expected[len(IDS) - 1 :])


def test_a_forced_text_has_the_strengths_of_a_generated_one(generate: Generate) -> None:
    free = generate(*THREE, max_tokens=8)
    trace = generate(*THREE, forced=free.tokens)
    assert trace.choices == free.tokens
    assert trace.strengths == free.strengths
    other = generate(*THREE, forced=[*free.tokens[:3], 17, 5])
    assert other.choices[:4] == free.tokens[:4]
    assert other.strengths["steps"][:4] == pytest.approx(free.strengths["steps"][:4])


def test_the_strengths_of_a_dose_do_not_depend_on_other_doses(generate: Generate) -> None:
    text = [5, 8, 200, 31, 77]
    together = generate(*THREE, Dose("push", 1.0), Dose("bias", 2.0), forced=text)
    for dose in THREE[:2]:
        alone = generate(dose, forced=text).strengths[dose.steer]
        assert together.strengths[dose.steer] == pytest.approx(alone)
    assert len({tuple(strengths) for strengths in together.strengths.values()}) == 3


def test_a_strength_of_zero_leaves_the_fixed_columns_out_too(generate: Generate) -> None:
    # So small a share of probability is one token; the steer is too weak to make it another.
    dose = Dose("dummy", 1e-9, phase="answer", dynamic=Dynamic(1e-6))
    trace = generate(dose, forced=[5, 8, 200])
    zero = [step for step, value in enumerate(trace.strengths["dummy"]) if value == 0]
    assert zero
    assert torch.equal(trace.logprobs[zero], generate(forced=[5, 8, 200]).logprobs[zero])


def test_a_delta_past_its_last_step_reports_zero_and_adds_nothing(generate: Generate) -> None:
    text = [5, 8, 200, 31, 77, 9, 12]
    strengths = generate(dynamic("walk", 2.0, 0.9), forced=text).strengths["walk"]
    assert all(strengths[:4]) and strengths[4:] == [0.0] * 3


def test_the_end_token_ends_the_text(generate: Generate) -> None:
    free = generate(*THREE, max_tokens=6)
    end = free.tokens[2]
    ended = generate(*THREE, max_tokens=6, eos=end)
    assert ended.tokens == free.tokens[: free.tokens.index(end) + 1]
    assert len(ended.strengths["steps"]) == len(ended.tokens)


def test_float32_gives_the_same_result_up_to_rounding(llama: Any, generate: Generate) -> None:
    double = generate(*THREE, max_tokens=6)
    llama.float()
    try:
        single = generate(*THREE, max_tokens=6)
    finally:
        llama.double()
    assert single.logprobs.dtype == torch.float32
    assert single.tokens == double.tokens
    for name, strengths in double.strengths.items():
        assert single.strengths[name] == pytest.approx(strengths, abs=1e-4)
