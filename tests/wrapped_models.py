"""Tiny models around a language model, with random weights, a vision tower and a tokenizer.

Heads are 32 wide in the language models: vLLM's attention on a CPU supports no smaller heads.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

HIDDEN, VOCAB, LAYERS = 64, 500, 3
VISION_LAYERS = 3  # as many as the decoder has: a list of that length is not enough to find it
IMAGE, IMAGE_START, IMAGE_END, IMAGE_BREAK, VIDEO = range(490, 495)
IMAGE_WORDS = {
    IMAGE: "<image>",
    IMAGE_START: "<image_start>",
    IMAGE_END: "<image_end>",
    IMAGE_BREAK: "<image_break>",
    VIDEO: "<video>",
}

_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT = {
    **_TOKENS,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 1}
_TOWER = {**_VISION, "num_hidden_layers": VISION_LAYERS}
_QWEN_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 1,
    "depth": VISION_LAYERS,
    "out_hidden_size": HIDDEN,
}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
    "tie_word_embeddings": False,
}


def _gemma3() -> Any:
    text = {
        **_TEXT,
        "query_pre_attn_scalar": 32,
        "sliding_window": 256,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "tie_word_embeddings": False,
    }
    return transformers.Gemma3Config(
        text_config=text,
        vision_config={**_TOWER, "image_size": 56, "patch_size": 14, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
        tie_word_embeddings=False,
        **{key: _TOKENS[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )


def _mistral3() -> Any:
    return transformers.Mistral3Config(
        text_config={**_TEXT, "model_type": "mistral", "sliding_window": None},
        vision_config={
            **_TOWER,
            "model_type": "pixtral",
            "head_dim": 32,
            "image_size": 56,
            "patch_size": 14,
        },
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def _qwen2_5_vl() -> Any:
    return transformers.Qwen2_5_VLConfig(
        text_config={
            **{key: size for key, size in _TEXT.items() if key != "head_dim"},
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]},
        },
        vision_config={**_QWEN_TOWER, "fullatt_block_indexes": [1]},
        **_QWEN_TOKENS,
    )


def _qwen3_vl() -> Any:
    return transformers.Qwen3VLConfig(
        text_config={
            **_TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            **_QWEN_TOWER,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        **_QWEN_TOKENS,
    )


def _llama4() -> Any:
    return transformers.Llama4Config(
        text_config={
            **_TEXT,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 256,
        },
        vision_config={
            **_TOWER,
            "image_size": 56,
            "patch_size": 14,
            "intermediate_size": 128,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        },
        image_token_index=IMAGE,
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
    )


WRAPPED: Mapping[str, Callable[[], Any]] = {
    "Gemma3ForConditionalGeneration": _gemma3,
    "Mistral3ForConditionalGeneration": _mistral3,
    "Qwen2_5_VLForConditionalGeneration": _qwen2_5_vl,
    "Qwen3VLForConditionalGeneration": _qwen3_vl,
    "Llama4ForConditionalGeneration": _llama4,
}


def wrapped_model(name: str) -> Any:
    """A model in float32 whose weights are large enough for next-token choices to differ."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(WRAPPED[name]()).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, _scale(parameter_name, small="Gemma3" in name))
    return model


def save_wrapped(name: str, folder: Path) -> Path:
    """Save a model and its tokenizer in Hugging Face layout."""
    wrapped_model(name).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def word_tokenizer() -> Any:
    """Token ``i`` is the word ``w{i}``, or one of the special words."""
    words = {f"w{index}": index for index in range(VOCAB)}
    special = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", **IMAGE_WORDS}
    words = {special.get(index, word): index for word, index in words.items()}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<image_start>",
            "eoi_token": "<image_end>",
            "image_break_token": "<image_break>",
            "video_token": "<video>",
        },
    )


def _scale(name: str, *, small: bool) -> float:
    if "lm_head" in name:
        return 0.5
    # Gemma scales its embedding up: were it as large, every token would be followed by itself.
    return (0.06 if small else 0.5) if "embed_tokens" in name else 0.15
