"""The language model inside a Hugging Face model, which may also read images, audio or video.

A multimodal model's config has one for the language model inside it. Decoder layers, sizes and
limits are that one's; for a model of text alone both are the same config.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import nn

from vllm_steer.families import decoder_layers

_MODALITIES: Final = ("image", "video", "audio")


def text_config(model: Any) -> Any:
    """The config of a model's language model."""
    return model.config.get_text_config()


def is_multimodal(config: Any) -> bool:
    """Whether a config is that of a model around a language model."""
    return config.get_text_config() is not config


def auto_class(config: Any) -> Any:
    """The class of Transformers that loads the model of a config, with its LM head."""
    import transformers

    if is_multimodal(config):
        general = getattr(transformers, "AutoModelForMultimodalLM", None)
        auto = general or transformers.AutoModelForImageTextToText
        if type(config) in auto._model_mapping:
            return auto
    return transformers.AutoModelForCausalLM


def placeholder_ids(model: Any) -> list[int] | None:
    """The ids of the tokens that stand for images, audio or video: those that the config of a
    multimodal model has, None for a model of text.
    """
    if not is_multimodal(model.config):
        return None
    names = [f"{kind}_token_{end}" for kind in _MODALITIES for end in ("id", "index")]
    values = [getattr(model.config, name, None) for name in names]
    return sorted({value for value in values if isinstance(value, int)})


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder blocks of a model."""
    return decoder_layers(model, text_config(model).num_hidden_layers)


def decoder_of(model: Any) -> nn.Module:
    """The module that owns the decoder blocks and runs them."""
    layers = layers_of(model)
    owner: nn.Module = next(m for m in model.modules() if any(layers is c for c in m.children()))
    return owner


def backbone(model: Any) -> nn.Module:
    """The model without its LM head: called with ``input_ids``, it returns ``last_hidden_state``,
    the head's input.
    """
    base: nn.Module = decoder_of(model) if is_multimodal(model.config) else model.base_model
    return base


def last_logits_only(model: Any) -> dict[str, int]:
    """The argument of a forward pass that computes logits for the last position alone: those of a
    whole prompt take gigabytes where the vocabulary is large. Empty for a model that has no such
    argument.
    """
    has_it = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if has_it else {}


def architectures_of(model: Any) -> list[str]:
    """A model's architecture, followed by that of the language model inside a multimodal one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = list(model.config.architectures or [type(model).__name__])
    if is_multimodal(model.config):
        inside = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text_config(model).model_type)
        names += [inside] if isinstance(inside, str) else []
    return names


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Context that puts the model in evaluation mode, without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
