"""Vectors and deltas on Hugging Face models, against one token at a time written out here."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from outside import CONCEPT_VECTORS, needs
from safetensors.torch import load_file

from vllm_steer import DeltaSteer, LMSteer, SteerError, VectorSteer, hf
from vllm_steer.hf.layers import steer_tokens

VOCAB, HIDDEN, HEADS_WIDE, LAYERS, STEPS = 29, 8, 12, 3, 3
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [9, 2, 6, 5, 3, 5]])
PROMPT = 3
SITES_OF = {
    "llama": ("resid", "attn_in", "attn_out", "heads"),
    "gpt2": ("resid", "attn_in", "attn_out", "heads"),
    "olmo2": ("resid", "attn_out", "heads"),
}
# Where a site is: (module, whether it is the module's input).
PLACES = {
    "llama": {
        "resid": ("model.layers.{}", False),
        "attn_in": ("model.layers.{}.input_layernorm", False),
        "attn_out": ("model.layers.{}.self_attn", False),
        "heads": ("model.layers.{}.self_attn.o_proj", True),
    },
    "gpt2": {
        "resid": ("transformer.h.{}", False),
        "attn_in": ("transformer.h.{}.ln_1", False),
        "attn_out": ("transformer.h.{}.attn", False),
        "heads": ("transformer.h.{}.attn.c_proj", True),
    },
}
PLACES["olmo2"] = PLACES["llama"]
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@cache
def model_of(name: str) -> Any:
    torch.manual_seed(0)
    llama = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 12,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        **SPECIAL,
    }
    if name == "llama":
        config: Any = transformers.LlamaConfig(**llama, head_dim=HEADS_WIDE // 2)
        return transformers.LlamaForCausalLM(config).double().eval()
    if name == "olmo2":
        return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**llama)).double().eval()
    sizes = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 2}
    config = transformers.GPT2Config(**sizes, n_positions=32, **SPECIAL)
    return transformers.GPT2LMHeadModel(config).double().eval()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def vector(site: str, mode: str = "add", *layers: int, seed: int = 0) -> VectorSteer:
    rows = layers or (0, 2)
    return VectorSteer(
        vectors=normal(len(rows), HIDDEN, seed=seed), layers=rows, site=site, mode=mode
    )


def delta(site: str, width: int = HIDDEN, **fields: Any) -> DeltaSteer:
    return DeltaSteer(delta=normal(STEPS, 2, width), layers=(0, 2), site=site, **fields)


def steers_for(name: str) -> dict[str, Any]:
    wide = HEADS_WIDE if name == "llama" else HIDDEN
    steers: dict[str, Any] = {
        "resid": vector("resid"),
        "resid2": vector("resid", seed=1),
        "turn": vector("resid", "rotate", seed=2),
        "turn2": vector("resid", "rotate", 1, 2, seed=3),
        "attn_out": vector("attn_out", "rotate"),
        "heads": delta("heads", wide),
        "dim": delta("resid", schedule="dim"),
        "head": LMSteer(variant="add", add=normal(1, HIDDEN), epsilon=0.5, hidden_size=HIDDEN),
    }
    if "attn_in" in SITES_OF[name]:
        steers["attn_in"] = vector("attn_in", "rotate")
        steers["delta_in"] = delta("attn_in", schedule="start")
    return steers


def on_one_token(
    x: torch.Tensor, position: int, layer: int, site: str, doses: Mapping[str, Any], name: str
) -> torch.Tensor:
    """The equations for ``x [width]`` at one position of a text with a prompt of ``PROMPT``."""
    changed, norm, has_rotation = x.clone(), x.norm(), False
    for steer_name, dose_options in doses.items():
        steer = steers_for(name)[steer_name]
        options = dose_options if isinstance(dose_options, Mapping) else {"strength": dose_options}
        layers = options.get("layers", steer.layers)
        phase = options.get("phase", "all")
        outside = phase == ("generation" if position < PROMPT else "prompt")
        if steer.site != site or layer not in layers or outside:
            continue
        row, v = steer.layers.index(layer), options["strength"]
        if isinstance(steer, VectorSteer):
            w = steer.vectors[row].double()
            w = w / w.norm() if steer.mode == "rotate" else w
            has_rotation = has_rotation or steer.mode == "rotate"
        else:
            i = position - (PROMPT - 1)
            schedule = options.get("schedule", steer.schedule)
            if not 0 <= i < (1 if schedule == "start" else STEPS):
                continue
            w = steer.delta[i, row].double()
            v = v * (1 - i / STEPS) if schedule == "dim" else v
        changed = changed + v * w
    return changed * norm / changed.norm() if has_rotation else changed


@contextmanager
def by_hand(name: str, doses: Mapping[str, Any]) -> Iterator[Any]:
    """The model with every token of every site passed through ``on_one_token``."""
    model = model_of(name)

    def changed(x: torch.Tensor, site: str, layer: int) -> torch.Tensor:
        rows = [
            torch.stack([on_one_token(x[b, t], t, layer, site, doses, name) for t in range(6)])
            for b in range(len(x))
        ]
        return torch.stack(rows)

    def before(site: str, layer: int) -> Any:
        return lambda _module, args: (changed(args[0], site, layer),)

    def after(site: str, layer: int) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> Any:
            if isinstance(out, tuple):
                return (changed(out[0], site, layer), *out[1:])
            return changed(out, site, layer)

        return hook

    with ExitStack() as hooks:
        for site in SITES_OF[name]:
            path, is_input = PLACES[name][site]
            for layer in range(LAYERS):
                module = model.get_submodule(path.format(layer))
                if is_input:
                    handle = module.register_forward_pre_hook(before(site, layer))
                else:
                    handle = module.register_forward_hook(after(site, layer))
                hooks.callback(handle.remove)
        yield model


MIXES: list[dict[str, Any]] = [
    {"resid": 2.0},
    {"turn": -3.0},
    {"attn_out": 4.0},
    {"heads": 1.5},
    {"dim": 1.5},
    {"resid": 1.0, "resid2": -2.0, "turn": 3.0, "turn2": -1.0, "dim": 2.0},
    {"resid": {"strength": 1.5, "phase": "prompt"}, "turn": {"strength": 5, "layers": [2]}},
    {
        "turn": {"strength": 2.0, "phase": "generation"},
        "resid": {"strength": -2, "phase": "prompt"},
    },
    {"heads": {"strength": 2.0, "phase": "generation"}, "dim": {"strength": 2, "phase": "prompt"}},
    {"heads": {"strength": 2.0, "schedule": "start"}, "dim": {"strength": 2, "layers": [0]}},
    {"heads": {"strength": 2.0, "schedule": "dim"}, "attn_out": 8.0},
    {"attn_in": 4.0, "heads": 1.0, "attn_out": 2.0, "resid": -1.0, "delta_in": 2.0},
]


@pytest.mark.parametrize("strengths", MIXES, ids=str)
@pytest.mark.parametrize("name", SITES_OF)
@torch.no_grad()
def test_steered_logits_are_those_computed_by_hand(name: str, strengths: dict[str, Any]) -> None:
    if not set(strengths) <= set(steers_for(name)):
        pytest.skip("the family has no norm before its attention")
    with by_hand(name, strengths) as model:
        expected = model(TOKENS).logits
    with hf.steered(model, strengths, steers_for(name), prompt_length=PROMPT):
        result = model(TOKENS).logits
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(result, model(TOKENS).logits, atol=1e-6)


@torch.no_grad()
def test_steers_of_layers_and_of_the_head_act_together() -> None:
    model, strengths = model_of("llama"), {"resid": 1.0, "head": 3.0}
    steers = steers_for("llama")
    with by_hand("llama", {"resid": 1.0}):
        hidden = model.base_model(TOKENS).last_hidden_state
    expected = (hidden + 1.5 * steers["head"].add[0].double()) @ model.lm_head.weight.T
    with hf.steered(model, strengths, steers):
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SITES_OF)
@torch.no_grad()
def test_strength_zero_leaves_every_bit(name: str, dtype: torch.dtype) -> None:
    model = model_of(name).to(dtype)
    try:
        expected = model(TOKENS).logits
        with hf.steered(model, dict.fromkeys(steers_for(name), 0.0), steers_for(name)):
            assert torch.equal(model(TOKENS).logits, expected)
    finally:
        model.double()
        model_of.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_token_before_the_first_dose_keeps_every_bit(dtype: torch.dtype) -> None:
    model = model_of("llama").to(dtype)
    strengths = {"heads": 2.0, "turn": {"strength": 9.0, "phase": "generation"}}
    try:
        expected = model(TOKENS).logits
        with hf.steered(model, strengths, steers_for("llama"), prompt_length=PROMPT):
            result = model(TOKENS).logits
    finally:
        model.double()
        model_of.cache_clear()
    assert torch.equal(result[:, : PROMPT - 1], expected[:, : PROMPT - 1])
    assert not torch.equal(result[:, PROMPT - 1], expected[:, PROMPT - 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_wide_and_rounded_once(dtype: torch.dtype) -> None:
    x = normal(5, 63).to(dtype)
    changes = 1e-2 * normal(5, 63, seed=1)
    turning = torch.tensor([True, False, True, False, False])
    acting = torch.tensor([True, True, True, True, False])
    steered = x.double() + changes.double()
    turned = steered * (x.double().norm(dim=-1) / steered.norm(dim=-1))[:, None]
    expected = torch.where(turning[:, None], turned, steered)
    result = steer_tokens(x, changes, acting, turning)
    assert result.dtype == dtype
    assert torch.equal(result[4], x[4])
    error = (result[:4].double() - expected[:4]).abs()
    assert (error <= 0.51 * torch.finfo(dtype).eps * 2 * expected[:4].abs()).all()


def test_a_rotation_keeps_the_norm_and_ends_at_the_direction() -> None:
    x, w = normal(7, 500).double(), normal(500, seed=4).double()
    every = torch.ones(7, dtype=torch.bool)
    unit = w / w.norm()
    for v in (-1e9, -8.0, 3.0, 1e9):
        result = steer_tokens(x, (v * unit).expand(7, -1), every, every)
        torch.testing.assert_close(result.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(result, x.norm(dim=-1, keepdim=True) * unit, rtol=1e-6, atol=1e-6)


def test_a_zero_sum_is_not_normalized() -> None:
    x = torch.tensor([[1.0, -2.0]])
    every = torch.ones(1, dtype=torch.bool)
    assert torch.equal(steer_tokens(x, -x, every, every), torch.zeros(1, 2))


class Block(torch.nn.Module):
    """The part of a decoder block that steers at ``attn_in`` use: its input norm."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.input_layernorm(x)


class FakeEngine(torch.nn.Module):
    """As many layers as a 7B Llama, and as wide."""

    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], num_hidden_layers=32, hidden_size=4096
    )

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(32))

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


@needs(CONCEPT_VECTORS)
@pytest.mark.parametrize("strength", [-16.0, 8.0, 32.0])
def test_published_concept_vectors_act_as_their_authors_formula(strength: float) -> None:
    weights = load_file(CONCEPT_VECTORS / "Llama-2-7b-chat-hf" / "humor.safetensors")["W"]
    concept = VectorSteer(vectors=weights, layers=tuple(range(32)), site="attn_in", mode="rotate")
    expected = x = normal(2, 5, 4096)
    for w in weights:
        norm = expected.norm(dim=-1, keepdim=True)
        expected = expected + strength * w / w.norm()
        expected = expected * norm / expected.norm(dim=-1, keepdim=True)
    with hf.steered(FakeEngine(), {"humor": strength}, {"humor": concept}) as model:
        torch.testing.assert_close(model(inputs_embeds=x), expected, rtol=1e-4, atol=1e-5)


def refused(name: str, strengths: dict[str, Any], steers: dict[str, Any], message: str) -> None:
    model = model_of(name)
    with pytest.raises(SteerError, match=message), hf.steered(model, strengths, steers):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "generate" not in vars(model)


def test_steers_that_do_not_fit_the_model_are_refused() -> None:
    wrong_width = VectorSteer(vectors=torch.ones(1, 6), layers=(0,))
    beyond = VectorSteer(vectors=torch.ones(2, HIDDEN), layers=(2, 7))
    refused(
        "llama", {"odd": 1}, {"odd": wrong_width}, "steer odd is 6 wide; the site resid .* is 8"
    )
    refused("llama", {"x": 1}, {"x": delta("heads")}, "is 8 wide; the site heads .* is 12")
    refused("llama", {"b": 1}, {"b": beyond}, "layer 7 does not exist: .* layers 0 to 2")
    refused("olmo2", {"a": 1}, {"a": vector("attn_in")}, "the site attn_in does not exist")
    refused("llama", {"odd": 1, "no": 1}, {"odd": wrong_width}, "steer no is unknown; steers: odd")


def test_options_that_are_invalid_in_a_request_are_refused() -> None:
    steers = steers_for("llama")
    refused("llama", {"turn": {"strength": 1, "layer": 2}}, steers, "unknown options .?layer")
    refused("llama", {"turn": {"strength": 1, "schedule": "dim"}}, steers, "only a delta steer")
    refused("llama", {"head": {"strength": 1, "layers": "0"}}, steers, "acts at the LM head")


def test_a_model_of_an_unknown_family_is_refused() -> None:
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=3, n_head=2)
    model = transformers.BloomForCausalLM(config)
    with (
        pytest.raises(SteerError, match="BloomForCausalLM cannot be steered inside its layers"),
        hf.steered(model, {"resid": 1.0}, steers_for("llama")),
    ):
        pass


@torch.no_grad()
def test_no_hook_stays_on_the_model_after_an_error() -> None:
    model, steers = model_of("gpt2"), steers_for("gpt2")
    before = model(TOKENS).logits
    strengths = {"resid": 2.0, "heads": 1.0, "attn_in": 3.0}
    with pytest.raises(KeyError), hf.steered(model, strengths, steers):
        assert not torch.equal(model(TOKENS).logits, before)
        raise KeyError
    assert torch.equal(model(TOKENS).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "generate" not in vars(model)
