"""Engines' configurations: real ones of vLLM, of a small model that has no weights."""

import copy
import tempfile
from functools import cache
from typing import Any

import transformers

HIDDEN, HEADS, HEAD_SIZE, LAYERS, VOCAB = 6, 2, 4, 3, 11
"""A Llama whose heads side by side are wider than its hidden states."""


@cache
def _create(**arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    llama = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
    )
    with tempfile.TemporaryDirectory() as folder:
        llama.save_pretrained(folder)
        fields = {name: dict(value) for name, value in arguments.items()}
        args = EngineArgs(folder, skip_tokenizer_init=True, max_model_len=64, **fields)
        config = args.create_engine_config()
    config.model_config.model = "org/model"
    return config


def engine_config(plan: Any, **changed: Any) -> Any:
    """A real ``VllmConfig``; ``a__b=x`` sets field ``b`` of its part ``a`` to ``x``."""
    config = copy.copy(_create())
    config.additional_config = {"steer": plan if isinstance(plan, dict) else plan.to_json()}
    for path, value in changed.items():
        *parts, field = path.split("__")
        part = config
        for name in parts:
            setattr(part, name, copy.copy(getattr(part, name)))
            part = getattr(part, name)
        assert hasattr(part, field), f"{path}: this vLLM has no such field"
        setattr(part, field, value)
    return config


def speculative(**changed: Any) -> Any:
    """The configuration of a draft model that costs nothing."""
    fields = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    config = copy.copy(_create(speculative_config=tuple(fields.items())).speculative_config)
    for field, value in changed.items():
        assert hasattr(config, field), field
        setattr(config, field, value)
    return config


def connector(name: str | None, *inner: str) -> Any:
    """The configuration of a KV connector, optionally one that contains others."""
    from vllm.config import KVTransferConfig

    children = [{"kv_connector": child, "kv_connector_extra_config": {}} for child in inner]
    return KVTransferConfig(
        kv_connector=name,
        kv_role="kv_both" if name else None,
        kv_connector_extra_config={"connectors": children} if inner else {},
    )
