"""Models around a language model: the language model inside is read, steered and fitted."""

from typing import Any

import pytest
import torch
import transformers
import wrapped_models
from doctor_tools import by_name
from wrapped_models import HIDDEN, IMAGE, LAYERS, VOCAB, WRAPPED, save_wrapped, word_tokenizer

from vllm_steer import DeltaSteer, LMSteer, SteerError, VectorSteer, hf
from vllm_steer.doctor.architecture import describe, read_architecture
from vllm_steer.doctor.reference import load_model
from vllm_steer.doctor.trials import measure_sizes
from vllm_steer.evaluation.perplexity import text_nll
from vllm_steer.families import FAMILIES, SELF_TESTED
from vllm_steer.fit import activations, fit_delta, fit_lm_steer, fit_vector
from vllm_steer.fit.likelihood import fit_vector_by_likelihood
from vllm_steer.inspection import read_output_embedding, text_evidence
from vllm_steer.models import LanguageModel, load_language_model

TEXT = "w11 w12 w13 w14 w15 w16 w17"
IDS = torch.tensor([[11, 12, 13, 14, 15, 16, 17]])
BLOCKS = {
    name: "language_model.model.layers" if "Llama4" in name else "model.language_model.layers"
    for name in WRAPPED
}
MODULES = {"resid": "", "attn_in": "input_layernorm", "attn_out": "self_attn"}


@pytest.fixture(scope="module", params=WRAPPED)
def wrapped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model as this project loads it, in float64, and its folder."""
    folder = save_wrapped(request.param, tmp_path_factory.mktemp(request.param) / "model")
    model = load_language_model(str(folder), dtype="float64", device="cpu")
    return LanguageModel(request.param, model.model, model.tokenizer), folder


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def block(model: LanguageModel, layer: int) -> Any:
    return model.model.get_submodule(f"{BLOCKS[model.name]}.{layer}")


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def activation(model: LanguageModel, layer: int, site: str) -> torch.Tensor:
    """What PyTorch's own hook sees at a module of the language model, ``[tokens, width]``."""
    seen = []
    module = block(model, layer).get_submodule(MODULES.get(site, "self_attn.o_proj"))
    if site == "heads":
        hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    else:
        hook = module.register_forward_hook(lambda _m, _a, output: seen.append(first(output)[0]))
    with hook:
        model.model(input_ids=IDS)
    return seen[0]


def adding(model: LanguageModel, change: torch.Tensor) -> Any:
    """A hook that adds ``[tokens, width]`` to the residual stream after layer 1."""
    return block(model, 1).register_forward_hook(
        lambda _m, _a, output: (
            (output[0] + change, *output[1:]) if isinstance(output, tuple) else output + change
        )
    )


@torch.no_grad()
def changed_logits(
    model: LanguageModel, layer: int, site: str, change: torch.Tensor, *, rotates: bool
) -> torch.Tensor:
    """Logits with ``x + change``, or that at the norm of ``x``, at a module of one layer."""

    def act(output: Any) -> Any:
        x = first(output)
        y = x + change
        if rotates:
            y = y * (x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True))
        return (y, *output[1:]) if isinstance(output, tuple) else y

    module = block(model, layer).get_submodule(MODULES.get(site, "self_attn.o_proj"))
    if site == "heads":
        hook = module.register_forward_pre_hook(lambda _, args: (act(args[0]),))
    else:
        hook = module.register_forward_hook(lambda _m, _a, output: act(output))
    with hook:
        logits: torch.Tensor = model.model(input_ids=IDS).logits[0]
    return logits


@pytest.mark.parametrize("mode", ["add", "rotate"])
@pytest.mark.parametrize("site", MODULES)
@torch.no_grad()
def test_a_vector_enters_the_language_model(wrapped: Any, site: str, mode: str) -> None:
    model, _ = wrapped
    w = normal(HIDDEN)
    steer = VectorSteer(vectors=w[None], layers=(1,), site=site, mode=mode)
    change = 3 * (w / w.norm() if mode == "rotate" else w)
    expected = changed_logits(model, 1, site, change, rotates=mode == "rotate")
    plain = model.model(input_ids=IDS).logits[0]
    with hf.steered(model.model, {"s": 3.0}, {"s": steer}):
        steered = model.model(input_ids=IDS).logits[0]
    torch.testing.assert_close(steered, expected, rtol=0, atol=1e-6)
    assert (steered - plain).abs().max() > 0.1


@torch.no_grad()
def test_a_delta_at_the_heads_counts_its_steps_from_the_prompt_given(wrapped: Any) -> None:
    model, _ = wrapped
    steer = DeltaSteer(delta=normal(2, 1, 64), layers=(2,))
    change = torch.zeros(IDS.shape[1], 64, dtype=torch.float64)
    change[4:6] = 2 * steer.delta[:, 0].double()
    expected = changed_logits(model, 2, "heads", change, rotates=False)
    with hf.steered(model.model, {"s": 2.0}, {"s": steer}, prompt_length=5):
        steered = model.model(input_ids=IDS).logits[0]
    torch.testing.assert_close(steered, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_phases_follow_a_generation(wrapped: Any) -> None:
    """``generate`` with a cache and one pass over its text, with hooks written out, agree."""
    model, _ = wrapped
    w = normal(HIDDEN)
    steer = VectorSteer(vectors=w[None], layers=(1,), site="resid")
    doses = {"s": {"strength": 2.0, "phase": "generation"}}
    with hf.steered(model.model, doses, {"s": steer}):
        text = model.model.generate(input_ids=IDS[:, :3], max_new_tokens=4, do_sample=False)
    length = text.shape[1]
    change = torch.zeros(length, HIDDEN, dtype=torch.float64)
    change[3:] = 2 * w
    with adding(model, change):
        logits = model.model(input_ids=text).logits[0]
    assert text[0, 3:].tolist() == logits[2:-1].argmax(-1).tolist()


@torch.no_grad()
def test_an_lm_steer_enters_before_the_head(wrapped: Any) -> None:
    model, _ = wrapped
    p1, p2 = normal(1, HIDDEN, 4), normal(1, HIDDEN, 4)
    steer = LMSteer(
        variant="multiply", projector1=p1, projector2=p2, epsilon=0.01, hidden_size=HIDDEN
    )
    inner = model.model if hasattr(model.model, "lm_head") else model.model.language_model
    head, seen = inner.lm_head, []
    with head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])):
        model.model(input_ids=IDS)
    c = seen[0]
    expected = (c + 0.01 * 5 * (c @ p1[0] @ p2[0].T)) @ head.weight.T
    with hf.steered(model.model, {"s": 5.0}, {"s": steer}):
        steered = model.model(input_ids=IDS).logits[0]
    torch.testing.assert_close(steered, expected, rtol=0, atol=1e-6)


def test_fits_read_the_language_model(wrapped: Any) -> None:
    model, _ = wrapped
    for site in (*MODULES, "heads"):
        rows = list(
            activations(model.model, model.tokenizer, [TEXT], site=site, layers=range(LAYERS))
        )
        expected = torch.stack([activation(model, layer, site) for layer in range(LAYERS)], 1)
        torch.testing.assert_close(rows[0], expected, rtol=0, atol=1e-6)
    other = "w21 w22 w23"
    vector = fit_vector(model.model, model.tokenizer, [TEXT], [other])
    assert vector.layers == tuple(range(LAYERS))
    delta = fit_delta(model.model, model.tokenizer, [TEXT], [other], steps=2)
    assert delta.delta.shape == (2, LAYERS, 64)
    pair = ([TEXT, other], [1.0, -1.0])
    fitted = fit_vector_by_likelihood(
        model.model, model.tokenizer, *pair, layers=[1], steps=1, focus=None
    )
    assert fitted.vectors.shape == (1, HIDDEN)


def test_an_lm_steer_is_fitted_to_the_head(wrapped: Any) -> None:
    model, _ = wrapped
    steer = fit_lm_steer(
        model.model,
        model.tokenizer,
        [TEXT, "w21 w22 w23"],
        [1.0, -1.0],
        rank=4,
        steps=3,
        batch_size=2,
    )
    assert steer.projector1 is not None and steer.projector1.shape == (2, HIDDEN, 4)


@torch.no_grad()
def test_the_likelihood_and_the_evidence_of_a_text(wrapped: Any) -> None:
    model, _ = wrapped
    logs = model.model(input_ids=IDS).logits[0].log_softmax(-1)
    expected = -logs[:-1].gather(1, IDS[0, 1:, None]).sum().item()
    assert text_nll(model.model, [IDS[0].tolist()]) == pytest.approx([expected], rel=1e-9)
    steer = VectorSteer(vectors=normal(1, HIDDEN), layers=(1,), site="resid")
    sides = [
        changed_logits(model, 1, "resid", sign * steer.vectors[0].double(), rotates=False)
        .log_softmax(-1)[:-1]
        .gather(1, IDS[0, 1:, None])
        .sum()
        for sign in (1, -1)
    ]
    evidence = text_evidence(model, steer, TEXT)
    assert evidence.total == pytest.approx(float(sides[0] - sides[1]), abs=1e-5)


def test_the_output_embedding_is_read_from_the_checkpoint(wrapped: Any) -> None:
    model, folder = wrapped
    expected = wrapped_models.wrapped_model(model.name).get_output_embeddings().weight
    assert torch.equal(read_output_embedding(str(folder)), expected)


def test_the_doctor_describes_the_language_model(wrapped: Any) -> None:
    _, folder = wrapped
    architecture = read_architecture(str(folder))
    findings = by_name(describe(architecture))
    sizes = {"hidden_size": HIDDEN, "layers": LAYERS, "vocab_size": VOCAB}
    assert findings["sizes"].figures == sizes
    assert architecture.longest == 512
    assert {f.state for name, f in findings.items() if name.startswith("site")} == {"ok"}
    measured = measure_sizes(load_model(str(folder), "float32"), architecture, [IDS[0].tolist()])
    sizes_of_sites = {site: len(norms) for site, norms in measured.items() if site != "logits"}
    assert sizes_of_sites == dict.fromkeys((*MODULES, "heads"), LAYERS)


def test_the_tokenizer_knows_the_image_token() -> None:
    assert word_tokenizer()("w5 <image> w7")["input_ids"] == [5, IMAGE, 7]


def text_only_change(w: torch.Tensor, ids: list[int], prompt_length: int) -> torch.Tensor:
    """``w`` at each token but the prompt's image tokens."""
    is_image = [token == IMAGE and i < prompt_length for i, token in enumerate(ids)]
    return torch.stack([torch.zeros_like(w) if image else w for image in is_image])


WITH_IMAGE = [11, 12, IMAGE, IMAGE, 14, IMAGE, 16, 17]


@pytest.mark.parametrize("given", [False, True], ids=["ids-of-the-config", "positions-given"])
@torch.no_grad()
def test_phase_text_leaves_out_placeholders(wrapped: Any, given: bool) -> None:
    """The decoder alone, given embeddings: so no image has to be there."""
    model, _ = wrapped
    w = normal(HIDDEN)
    steer = VectorSteer(vectors=w[None], layers=(1,), site="resid")
    decoder = model.model.get_submodule(BLOCKS[model.name].removesuffix(".layers"))
    ids = torch.tensor([WITH_IMAGE])
    change = text_only_change(2 * w, WITH_IMAGE, len(WITH_IMAGE))
    with adding(model, change):
        expected = decoder(input_ids=ids, use_cache=False).last_hidden_state
    doses = {"s": {"strength": 2.0, "phase": "text"}}
    embeddings = decoder.embed_tokens(ids)
    if given:
        with hf.steered(model.model, doses, {"s": steer}, placeholders=[2, 3, 5]):
            steered = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    else:
        with hf.steered(model.model, doses, {"s": steer}):
            steered = decoder(input_ids=ids, use_cache=False).last_hidden_state
            with pytest.raises(SteerError, match="phase text: which tokens stand for images"):
                decoder(inputs_embeds=embeddings, use_cache=False)
    torch.testing.assert_close(steered, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_phase_text_on_a_model_with_an_image() -> None:
    """A whole model, its image given as pixels; then ``generate``, which goes on with a cache."""
    name = "Mistral3ForConditionalGeneration"
    inner = wrapped_models.wrapped_model(name).double()
    model = LanguageModel(name, inner, word_tokenizer())
    ids = torch.tensor([[11, 12, IMAGE, IMAGE, IMAGE, IMAGE, 14, 15]])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(3)).double()
    image = {"pixel_values": pixels, "image_sizes": torch.tensor([[56, 56]])}
    w = normal(HIDDEN)
    steer = VectorSteer(vectors=w[None], layers=(1,), site="resid")
    with hf.steered(inner, {"s": {"strength": 2.0, "phase": "text"}}, {"s": steer}):
        steered = inner(input_ids=ids, **image).logits[0]
        text = inner.generate(input_ids=ids, **image, max_new_tokens=4, do_sample=False)[0]
    change = text_only_change(2 * w, text.tolist(), ids.shape[1])
    with adding(model, change):
        expected = inner(input_ids=text[None], **image).logits[0]
    torch.testing.assert_close(steered, expected[: ids.shape[1]], rtol=0, atol=1e-6)
    assert text[ids.shape[1] :].tolist() == expected[ids.shape[1] - 1 : -1].argmax(-1).tolist()


@torch.no_grad()
def test_rows_with_images_at_other_places_are_refused(wrapped: Any) -> None:
    model, _ = wrapped
    steer = VectorSteer(vectors=normal(1, HIDDEN), layers=(1,), site="resid")
    decoder = model.model.get_submodule(BLOCKS[model.name].removesuffix(".layers"))
    ids = torch.tensor([[11, IMAGE, 13], [IMAGE, 12, 13]])
    with hf.steered(model.model, {"s": {"strength": 2.0, "phase": "text"}}, {"s": steer}):
        with pytest.raises(SteerError, match="rows of the batch have their images"):
            decoder(input_ids=ids, use_cache=False)
        decoder(input_ids=ids[:1].repeat(2, 1), use_cache=False)


@torch.no_grad()
def test_a_multimodal_model_outside_the_table_is_known_by_its_language_model() -> None:
    text = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config={**text, **layers, "model_type": "llama"},
        vision_config={
            **{"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48},
            **{"image_size": 28, "patch_size": 14},
            **layers,
        },
        image_token_id=IMAGE,
    )
    assert "LlavaForConditionalGeneration" not in {**FAMILIES, **SELF_TESTED}
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).double().eval()
    w = normal(32)
    steer = VectorSteer(vectors=w[None], layers=(1,), site="attn_out")
    attention = model.model.language_model.layers[1].self_attn
    with attention.register_forward_hook(lambda _m, _a, out: (out[0] + 2 * w, *out[1:])):
        expected = model(input_ids=IDS).logits
    with hf.steered(model, {"s": 2.0}, {"s": steer}):
        steered = model(input_ids=IDS).logits
    torch.testing.assert_close(steered, expected, rtol=0, atol=1e-6)
    assert (steered - model(input_ids=IDS).logits).abs().max() > 1e-4


def test_a_multimodal_model_with_an_unknown_language_model_is_refused() -> None:
    model = wrapped_models.wrapped_model("Gemma3ForConditionalGeneration")
    model.config.architectures = ["OtherForConditionalGeneration"]
    model.config.text_config.model_type = "bloom"
    steer = VectorSteer(vectors=normal(1, HIDDEN), layers=(1,), site="resid")
    message = "OtherForConditionalGeneration, BloomForCausalLM cannot be steered inside its layers"
    with (
        pytest.raises(SteerError, match=message),
        hf.steered(model, {"s": 2.0}, {"s": steer}),
    ):
        pass
