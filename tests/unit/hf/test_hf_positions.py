"""Steers that count tokens: ``generate`` equals one forward pass over the whole text."""

from typing import Any

import pytest
import torch
import transformers

from vllm_steer import DeltaSteer, SteerError, VectorSteer, hf

VOCAB, HIDDEN, STEPS, NEW = 29, 8, 4, 6
PROMPTS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
STRENGTHS: dict[str, Any] = {
    "everywhere": 0.5,
    "text": {"strength": -0.7, "phase": "text"},
    "prompt": {"strength": 1.0, "phase": "prompt"},
    "answer": {"strength": 2.0, "phase": "generation"},
    "delta": 1.5,
    "start": {"strength": 2.0, "schedule": "start"},
    "dim": {"strength": 2.0, "schedule": "dim"},
}


def gpt2() -> Any:
    sizes = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def llama_like(kind: str) -> Any:
    config_class = getattr(transformers, f"{kind}Config")
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        **({"sliding_window": 4, "query_pre_attn_scalar": 4} if kind == "Gemma2" else {}),
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.fixture(params=["gpt2", "Llama", "Gemma2"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    model = gpt2() if request.param == "gpt2" else llama_like(request.param)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return model.double().eval()


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steers() -> dict[str, Any]:
    delta = DeltaSteer(delta=normal(STEPS, 2, HIDDEN, seed=1), layers=(0, 1), site="heads")
    vectors = {
        "everywhere": VectorSteer(vectors=normal(2, HIDDEN, seed=2), layers=(0, 1), mode="rotate"),
        "text": VectorSteer(vectors=normal(1, HIDDEN, seed=9), layers=(0,)),
        "prompt": VectorSteer(vectors=normal(1, HIDDEN, seed=3), layers=(0,)),
        "answer": VectorSteer(vectors=normal(1, HIDDEN, seed=4), layers=(0,), site="attn_out"),
    }
    return {**vectors, "delta": delta, "start": delta, "dim": delta}


def generated(model: Any, tokens: torch.Tensor, **options: Any) -> Any:
    options = {"attention_mask": (tokens != 0).long(), "do_sample": False} | options
    return model.generate(
        tokens,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def forced(model: Any, sequences: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """The logits ``[batch, NEW, vocab]`` that each new token was chosen from, in one pass."""
    with hf.steered(model, STRENGTHS, steers(), prompt_length=prompt_length):
        return model(sequences).logits[:, prompt_length - 1 : -1]


def assert_same(logits: tuple[torch.Tensor, ...], expected: torch.Tensor) -> None:
    # generate() returns its logits in float32, whatever the model's dtype.
    torch.testing.assert_close(torch.stack(logits, dim=1), expected.float(), rtol=1e-5, atol=1e-5)


WAYS: dict[str, dict[str, Any]] = {
    "with a KV cache": {},
    "without a KV cache": {"use_cache": False},
    "with a static cache": {"cache_implementation": "static", "disable_compile": True},
    "with the prompt in chunks": {"prefill_chunk_size": 2},
    "with guessed tokens": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("mode", WAYS)
@torch.no_grad()
def test_generate_is_steered_as_one_pass_over_the_text(model: Any, mode: str) -> None:
    prompts = PROMPTS[:1] if "guessed" in mode else PROMPTS
    texts = (prompts, prompts[:, 1:])
    with hf.steered(model, STRENGTHS, steers()):
        outputs = [generated(model, tokens, **WAYS[mode]) for tokens in texts]
    for tokens, output in zip(texts, outputs, strict=True):
        assert_same(output.logits, forced(model, output.sequences, tokens.shape[1]))


@torch.no_grad()
def test_rows_padded_on_the_left_are_steered_as_single_rows(model: Any) -> None:
    short = PROMPTS[1:, :3]
    padded = torch.cat([PROMPTS[:1], torch.cat([torch.zeros_like(short[:, :2]), short], 1)])
    with hf.steered(model, STRENGTHS, steers()):
        output = generated(model, padded)
    for row, prompt in enumerate((PROMPTS[:1], short)):
        answer_ids = output.sequences[row : row + 1, padded.shape[1] :]
        expected = forced(model, torch.cat([prompt, answer_ids], 1), prompt.shape[1])
        assert_same(tuple(step[row : row + 1] for step in output.logits), expected)


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_beams_are_scored_as_steered_texts(model: Any, use_cache: bool) -> None:
    with hf.steered(model, STRENGTHS, steers()):
        output = generated(
            model,
            PROMPTS,
            num_beams=3,
            num_return_sequences=2,
            output_scores=True,
            use_cache=use_cache,
        )
    log_p = forced(model, output.sequences, PROMPTS.shape[1]).log_softmax(-1)
    answer_ids = output.sequences[:, PROMPTS.shape[1] :, None]
    expected = log_p.gather(-1, answer_ids)[..., 0].mean(1)
    torch.testing.assert_close(output.sequences_scores, expected.float(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_samples_of_one_prompt_are_steered_alike(model: Any) -> None:
    with hf.steered(model, STRENGTHS, steers()):
        output = generated(model, PROMPTS, do_sample=True, num_return_sequences=3)
    assert_same(output.logits, forced(model, output.sequences, PROMPTS.shape[1]))


@torch.no_grad()
def test_generate_continues_from_a_filled_cache(model: Any) -> None:
    with hf.steered(model, STRENGTHS, steers(), prompt_length=PROMPTS.shape[1]):
        filled = model(PROMPTS[:, :3], use_cache=True).past_key_values
    with hf.steered(model, STRENGTHS, steers()):
        output = generated(model, PROMPTS, past_key_values=filled)
    assert_same(output.logits, forced(model, output.sequences, PROMPTS.shape[1]))


@torch.no_grad()
def test_embeddings_can_stand_for_the_prompt(model: Any) -> None:
    embedded = model.get_input_embeddings()(PROMPTS)
    with hf.steered(model, STRENGTHS, steers()):
        output = model.generate(inputs_embeds=embedded, max_new_tokens=NEW, do_sample=False)
        expected = model.generate(PROMPTS, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(output, expected[:, PROMPTS.shape[1] :])


@torch.no_grad()
def test_a_text_decoded_by_hand_counts_from_its_first_pass(model: Any) -> None:
    sequences = torch.cat([PROMPTS, PROMPTS.flip(1)], dim=1)
    expected = forced(model, sequences, PROMPTS.shape[1])
    with hf.steered(model, STRENGTHS, steers()):
        for _ in range(2):  # an empty cache begins another text
            output = model(PROMPTS, use_cache=True)
            logits = [output.logits[:, -1:]]
            for step in range(5, 9):
                token = sequences[:, step : step + 1]
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
                logits.append(output.logits)
            torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_cache_filled_outside_needs_the_prompt_length(model: Any) -> None:
    filled = model(PROMPTS, use_cache=True).past_key_values
    with (
        pytest.raises(SteerError, match="where the prompt ends is not known; give prompt_length"),
        hf.steered(model, {"delta": 1.0}, steers()),
    ):
        model(PROMPTS[:, :1], past_key_values=filled)
    with hf.steered(model, {"everywhere": 1.0}, steers()):
        model(PROMPTS[:, :1], past_key_values=filled)


@torch.no_grad()
def test_generate_is_restored_after_nested_blocks(model: Any) -> None:
    plain = generated(model, PROMPTS).sequences
    with hf.steered(model, {"delta": 4.0}, steers()), hf.steered(model, {"answer": 4.0}, steers()):
        nested = generated(model, PROMPTS).sequences
    with hf.steered(model, {"delta": 4.0, "answer": 4.0}, steers()):
        assert torch.equal(generated(model, PROMPTS).sequences, nested)
    assert not torch.equal(plain, nested)
    assert torch.equal(generated(model, PROMPTS).sequences, plain)
    assert "generate" not in vars(model)


def test_a_prompt_of_no_tokens_is_refused(model: Any) -> None:
    with (
        pytest.raises(SteerError, match="prompt_length is 0; a prompt has at least one token"),
        hf.steered(model, {"delta": 1.0}, steers(), prompt_length=0),
    ):
        pass
