"""The tokens of a prompt as it is served."""

from typing import Any

from vllm_steer.errors import SteerError
from vllm_steer.fit.answer_tokens import ids_of
from vllm_steer.untrusted_text import shown


def encode_prompt(
    tokenizer: Any, prompt: str, *, max_length: int, chat_template: bool = False
) -> list[int]:
    """A prompt's tokens: with the tokenizer's special ones, as in a completion, or as the only
    message of a user in the chat template, up to where the assistant would speak.

    A longer prompt is cut off from the left to ``max_length`` tokens. Raises ``SteerError`` for a
    prompt without tokens, for a tokenizer without a chat template, and for a template that does not
    take the message.
    """
    ids = _chat_ids(tokenizer, prompt) if chat_template else tokenizer(prompt)["input_ids"]
    if not ids:
        raise SteerError(f"prompt {shown(prompt)} has no tokens")
    return list(ids[-max_length:])


def _chat_ids(tokenizer: Any, prompt: str) -> list[int]:
    from jinja2.exceptions import TemplateError

    if not tokenizer.chat_template:
        raise SteerError("the tokenizer has no chat template; do without it")
    messages = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise SteerError(
            f"prompt {shown(prompt)}: the chat template does not take it ({error}); do without the "
            "template"
        ) from error
    return ids_of(tokenizer, text)
