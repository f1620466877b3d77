"""Conditions on a tiny Llama: verdicts from hidden states that plain hooks read."""

import itertools
from typing import Any

import pytest
import torch
from hand_steered import HIDDEN, LAYERS, SITES, TOKENS, by_hand, llama, normal

from vllm_steer import DeltaSteer, LMSteer, SteerError, VectorSteer, hf
from vllm_steer.steers import ConditionSteer, LowRankSteer, SAESteer

PROMPT = TOKENS.shape[1]
W = normal(1, HIDDEN, seed=21)
V = normal(1, HIDDEN, seed=22)


@torch.no_grad()
def states_of(tokens: torch.Tensor, layer: int) -> torch.Tensor:
    """The residual stream after a layer without any steer, ``[batch, tokens, width]``."""
    seen: list[Any] = []
    handle = llama().model.layers[layer].register_forward_hook(lambda _m, _a, out: seen.append(out))
    llama()(tokens)
    handle.remove()
    out = seen[0]
    return out[0] if isinstance(out, tuple) else out


def similarity(kind: str, x: torch.Tensor) -> float:
    """The similarity of one token."""
    w = W[0].double()
    if kind == "dot":
        return float((x * w).sum() / w.square().sum().sqrt())
    if kind == "cast":
        w = torch.tanh((x * w).sum() * w / w.square().sum())
    return float((x * w).sum() / (x.square().sum() * w.square().sum()).sqrt())


def values_of(kind: str, tokens: str, side: str, layer: int = 1) -> list[float]:
    """For each row the similarity that decides: of the last token, or the extreme of all."""
    rows = [[similarity(kind, x) for x in row] for row in states_of(TOKENS, layer)]
    extreme = max if side == "above" else min
    return [row[-1] if tokens == "last" else extreme(row) for row in rows]


def condition(threshold: float, layer: int = 1, **fields: Any) -> ConditionSteer:
    return ConditionSteer(vector=W, layers=(layer,), threshold=threshold, **fields)


def split_by(kind: str, tokens: str, side: str) -> tuple[ConditionSteer, int]:
    """A condition that holds for one of the two rows, and that row."""
    values = values_of(kind, tokens, side)
    steer = condition(sum(values) / 2, similarity=kind, tokens=tokens, side=side)
    row = values.index(max(values) if side == "above" else min(values))
    return steer, row


ADD = VectorSteer(vectors=V, layers=(2,))


@torch.no_grad()
def added_to(rows: set[int], first: int = PROMPT - 1, tokens: torch.Tensor = TOKENS) -> Any:
    """Logits with ``2 V`` added after layer 2 to some rows, from one position on."""
    outputs = []
    for row, ids in enumerate(tokens):
        act = lambda x, t, row=row: x + 2 * V[0].double() if row in rows and t >= first else x  # noqa: E731
        with by_hand({("resid", 2): act}) as model:
            outputs.append(model(ids[None]).logits[0])
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", ["cosine", "dot", "cast"])
@pytest.mark.parametrize("side", ["above", "below"])
@pytest.mark.parametrize("tokens", ["last", "any"])
@torch.no_grad()
def test_a_gated_steer_acts_on_the_rows_whose_prompt_is_on_the_conditions_side(
    kind: str, side: str, tokens: str
) -> None:
    harmful, row = split_by(kind, tokens, side)
    steers = {"s": ADD, "harmful": harmful}
    with hf.steered(llama(), {"s": {"strength": 2, "when": "harmful"}}, steers) as model:
        result = model(TOKENS).logits
    expected = added_to({row})
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    unsteered = llama()(TOKENS).logits
    assert not torch.allclose(result[row, -1], unsteered[row, -1])
    torch.testing.assert_close(result[1 - row], unsteered[1 - row], rtol=0, atol=0)
    torch.testing.assert_close(result[:, :-1], unsteered[:, :-1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("needs", "verdicts", "acts"),
    [
        ("any", (True, False), True),
        ("any", (False, False), False),
        ("all", (True, True), True),
        ("all", (True, False), False),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_gate_needs_any_or_all_of_its_conditions(
    needs: str, verdicts: tuple[bool, bool], acts: bool
) -> None:
    steers: dict[str, Any] = {"s": ADD}
    for name, holds in zip("ab", verdicts, strict=True):
        steers[name] = condition(-2.0 if holds else 2.0, similarity="cosine")
    dose = {"strength": 2, "when": {needs: ["a", "b"]}}
    with hf.steered(llama(), {"s": dose}, steers) as model:
        result = model(TOKENS).logits
    expected = added_to({0, 1} if acts else set())
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens", ["last", "any"])
@pytest.mark.parametrize("cuts", [(3,), (1, 2), (6,)], ids=str)
@torch.no_grad()
def test_a_prompt_in_several_passes_has_the_verdict_of_one(
    tokens: str, cuts: tuple[int, ...]
) -> None:
    harmful, _ = split_by("cosine", tokens, "above")
    steers, doses = {"s": ADD, "h": harmful}, {"s": {"strength": 2, "when": "h"}}
    with hf.steered(llama(), doses, steers) as model:
        expected = model(TOKENS).logits[:, -1]
    with hf.steered(llama(), doses, steers, prompt_length=PROMPT) as model:
        cache, bounds = None, (0, *cuts, PROMPT)
        for first, last in itertools.pairwise(bounds):
            out = model(TOKENS[:, first:last], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
    torch.testing.assert_close(out.logits[:, -1], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("phase", ["answer", "generation", {"answer": "1:3"}], ids=str)
@torch.no_grad()
def test_the_verdict_lasts_for_the_whole_answer(phase: Any, use_cache: bool) -> None:
    harmful, row = split_by("cosine", "last", "above")
    first, last = {"answer": (0, 9), "generation": (1, 9)}.get(str(phase), (1, 3))
    dose = {"strength": 2, "when": "h", "phase": phase}
    with hf.steered(llama(), {"s": dose}, {"s": ADD, "h": harmful}) as model:
        result = model.generate(
            TOKENS,
            attention_mask=torch.ones_like(TOKENS),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=True,
        )

    def act(x: torch.Tensor, t: int) -> torch.Tensor:
        return x + 2 * V[0].double() if first <= t - (PROMPT - 1) < last else x

    for index, ids in enumerate(result.sequences):
        with by_hand({("resid", 2): act} if index == row else {}) as model:
            expected = model(ids[None, :-1]).logits[0, PROMPT - 1 :]
        actual = torch.stack([step[index] for step in result.logits])
        # ``generate`` keeps logits in float32.
        torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_text_within_a_block_has_a_verdict_of_its_own() -> None:
    harmful, row = split_by("cosine", "any", "above")
    doses = {"s": {"strength": 2, "when": "h"}}
    with hf.steered(llama(), doses, {"s": ADD, "h": harmful}) as model:
        single = [model(TOKENS[index : index + 1]).logits[0] for index in (row, 1 - row, row)]
    expected = added_to({row})
    for index, logits in zip((row, 1 - row, row), single, strict=True):
        torch.testing.assert_close(logits, expected[index], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_condition_is_read_after_earlier_steers_and_before_those_of_its_own_place() -> None:
    early, own = 3 * normal(1, HIDDEN, seed=31), 50 * W
    with by_hand({("resid", 0): lambda x, t: x + early[0].double()}) as model:
        seen: list[Any] = []
        handle = model.model.layers[1].register_forward_hook(lambda _m, _a, out: seen.append(out))
        model(TOKENS)
        handle.remove()
    hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    values = [similarity("dot", hidden[row, -1]) for row in (0, 1)]
    steers = {
        "early": VectorSteer(vectors=early, layers=(0,)),
        "own": VectorSteer(vectors=own, layers=(1,)),
        "h": condition(sum(values) / 2, similarity="dot"),
        "s": ADD,
    }
    row = values.index(max(values))
    with hf.steered(llama(), {"early": 1, "own": 1}, steers) as model:
        base = model(TOKENS).logits
    doses = {"early": 1, "own": 1, "s": {"strength": 2, "when": "h"}}
    with hf.steered(llama(), doses, steers) as model:
        result = model(TOKENS).logits
    assert torch.equal(result[1 - row], base[1 - row])
    assert not torch.allclose(result[row, -1], base[row, -1])


GATED = {
    "rotate": VectorSteer(vectors=V, layers=(2,), mode="rotate"),
    "project": VectorSteer(vectors=V, layers=(2,), mode="project"),
    "delta": DeltaSteer(delta=normal(3, 1, HIDDEN), layers=(2,), site="resid"),
    "map": LowRankSteer(a=normal(1, 2, HIDDEN), b=normal(1, HIDDEN, 2), layers=(2,)),
    "feature": SAESteer(
        encoder=W, decoder=V, bias=torch.ones(1), threshold=torch.zeros(1), layers=(2,), mode="add"
    ),
    "head": LMSteer(variant="add", add=V, epsilon=1.0, hidden_size=HIDDEN),
    "words": LMSteer(variant="offset", offset=normal(1, 31), epsilon=1.0, hidden_size=HIDDEN),
}


@pytest.mark.parametrize("name", GATED)
@torch.no_grad()
def test_every_kind_can_be_gated(name: str) -> None:
    """Where the condition holds, a row is that of phase ``answer`` without a gate."""
    harmful, row = split_by("cast", "last", "below")
    steers = {"s": GATED[name], "h": harmful}
    with hf.steered(llama(), {"s": {"strength": 2, "when": "h"}}, steers) as model:
        gated = model(TOKENS).logits
    plain = {"strength": 2} if name in ("head", "words") else {"strength": 2, "phase": "answer"}
    with hf.steered(llama(), {"s": plain}, steers) as model:
        steered = model(TOKENS).logits
    unsteered = llama()(TOKENS).logits
    torch.testing.assert_close(gated[row, -1], steered[row, -1], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(gated[row, -1], unsteered[row, -1])
    assert torch.equal(gated[1 - row], unsteered[1 - row])
    assert torch.equal(gated[:, :-1], unsteered[:, :-1])


@torch.no_grad()
def test_a_gated_lm_steer_acts_from_the_last_token_of_the_prompt_on() -> None:
    values = [similarity("cosine", x) for x in states_of(TOKENS[:, :4], 1)[:, -1]]
    row = values.index(max(values))
    steers = {"s": GATED["head"], "h": condition(sum(values) / 2)}
    with hf.steered(llama(), {"s": {"strength": 3, "when": "h"}}, steers, prompt_length=4) as model:
        result = model(TOKENS).logits
    expected = llama().model(TOKENS).last_hidden_state
    expected[row, 3:] += 3 * V[0].double()
    expected = expected @ llama().lm_head.weight.T
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def refused(doses: dict[str, Any], steers: dict[str, Any], message: str) -> None:
    model = llama()
    with pytest.raises(SteerError, match=message), hf.steered(model, doses, steers):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gates_that_cannot_work_are_refused() -> None:
    steers = {"s": ADD, "h": condition(0.0), "late": condition(0.0, LAYERS - 1, site="resid")}
    refused({"h": 1.0}, steers, "steer h is a condition, which changes nothing by itself")
    refused({"s": {"when": "s"}}, steers, "has when 's', which is no condition; conditions: h")
    early = {"s": VectorSteer(vectors=V, layers=(0,)), "h": condition(0.0)}
    refused({"s": {"when": "h"}}, early, "too late for the first token of the answer")
    refused({"s": {"when": "h", "phase": "all"}}, steers, "a condition decides about the answer")
    wide = ConditionSteer(vector=torch.ones(1, 6), layers=(0,), threshold=0.0)
    refused({"s": {"when": "h"}}, {"s": ADD, "h": wide}, "condition h is 6 wide; the site resid")
    beyond = ConditionSteer(vector=W, layers=(7,), threshold=0.0)
    head = {"s": GATED["head"], "h": beyond}
    refused({"s": {"when": "h"}}, head, "layer 7 does not exist")


@torch.no_grad()
def test_an_answer_whose_prompt_was_not_read_is_refused() -> None:
    steers, doses = {"s": ADD, "h": condition(0.0)}, {"s": {"strength": 2, "when": "h"}}
    cache = llama()(TOKENS, use_cache=True).past_key_values
    with (
        hf.steered(llama(), doses, steers, prompt_length=PROMPT) as model,
        pytest.raises(SteerError, match="condition h was not read: run all of the prompt"),
    ):
        model(TOKENS[:, :1], past_key_values=cache)
    anywhere = {"s": ADD, "h": condition(0.0, tokens="any")}
    cache = llama()(TOKENS[:, :3], use_cache=True).past_key_values
    with (
        hf.steered(llama(), doses, anywhere, prompt_length=PROMPT) as model,
        pytest.raises(SteerError, match="condition h was not read: run all of the prompt"),
    ):
        model(TOKENS[:, 3:], past_key_values=cache)


@torch.no_grad()
def test_a_batch_of_other_rows_than_the_prompts_is_refused() -> None:
    steers, doses = {"s": ADD, "h": condition(0.0)}, {"s": {"strength": 2, "when": "h"}}
    with hf.steered(llama(), doses, steers, prompt_length=PROMPT) as model:
        cache = model(TOKENS, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0]))
        with pytest.raises(SteerError, match="was read for 2 rows and the batch has 1"):
            model(TOKENS[:1, :1], past_key_values=cache)


@torch.no_grad()
def test_a_steer_before_the_condition_needs_the_prompt_in_a_pass_of_its_own() -> None:
    early = VectorSteer(vectors=V, layers=(0,))
    harmful, row = split_by("cosine", "last", "above")
    steers = {"s": early, "h": harmful}
    doses = {"s": {"strength": 2, "when": "h", "phase": "generation"}}
    answer = torch.tensor([[7, 8], [7, 8]])
    with (
        hf.steered(llama(), doses, steers, prompt_length=PROMPT) as model,
        pytest.raises(SteerError, match="in a layer before the condition's"),
    ):
        model(torch.cat([TOKENS, answer], 1))
    with hf.steered(llama(), doses, steers) as model:
        cache = model(TOKENS, use_cache=True).past_key_values
        result = model(answer, past_key_values=cache).logits

    def act(x: torch.Tensor, t: int) -> torch.Tensor:
        return x + 2 * V[0].double() if t >= PROMPT else x

    for index in (0, 1):
        ids = torch.cat([TOKENS, answer], 1)[index : index + 1]
        with by_hand({("resid", 0): act} if index == row else {}) as model:
            expected = model(ids).logits[0, PROMPT:]
        torch.testing.assert_close(result[index], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_list_of_strengths_can_be_gated() -> None:
    harmful, row = split_by("cosine", "last", "above")
    doses = {"s": {"strength": [2.0], "when": "h"}}
    with hf.steered(llama(), doses, {"s": ADD, "h": harmful}) as model:
        result = model(TOKENS).logits
    torch.testing.assert_close(result, added_to({row}), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("site", ["attn_in", "attn_out", "resid"])
@torch.no_grad()
def test_a_condition_decides_about_a_steer_behind_it_in_the_same_layer(site: str) -> None:
    module = llama().get_submodule(SITES[site].format(2))
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _m, _a, out: seen.append(out))
    llama()(TOKENS)
    handle.remove()
    hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    values = [similarity("cosine", x) for x in hidden[:, -1]]
    row = values.index(max(values))
    steers = {"s": ADD, "h": condition(sum(values) / 2, 2, site=site)}
    with hf.steered(llama(), {"s": {"strength": 2, "when": "h"}}, steers) as model:
        result = model(TOKENS).logits
    torch.testing.assert_close(result, added_to({row}), rtol=1e-10, atol=1e-10)
