"""Selects the answer's tokens of a conversation, and those that a probe is fitted to.

A conversation is rendered by the tokenizer's chat template, or without one as

    <bos>Question: {question}
    Answer: {answer}

and tokenised as it stands, without more special tokens. The answer begins where the tokens part
from those of the same conversation without it: rendered up to the point where the assistant would
speak. The authors instead take the length of the template with an empty answer less 2, which finds
the same place where an empty answer costs exactly two tokens (Llama 2, Mistral 0.1) and another
one elsewhere. All else is theirs: the answer is cut off after 32 tokens and the conversation from
the left to 1,024; of the answer the last token is dropped, be it the end of the text or where it
was cut, and the first 16 of the others are kept. An answer of one token leaves none.

Source: von Ruette et al., "A Language Model's Guide Through Latent Space", ICML 2024
(arXiv 2402.14433), the authors' ``activations.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vllm_steer.errors import SteerError
from vllm_steer.fit.activations import SelectedTokens
from vllm_steer.texts.conversations import Conversation

LONGEST_ANSWER: Final = 32
_NAMES: Final[Mapping[str, str]] = {"user": "Question: ", "assistant": "Answer: "}


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as the model reads it, and what of it stands before the answer."""

    text: str
    before: str


def render(
    tokenizer: Any, conversation: Conversation, *, chat_template: bool = True
) -> RenderedConversation:
    """A conversation in the tokenizer's chat template, if it has one and ``chat_template`` is set.

    Raises ``SteerError`` for messages that the template does not take.
    """
    messages = list(conversation.messages)
    if not (chat_template and tokenizer.chat_template):
        before = plain(tokenizer, messages[:-1]) + _NAMES["assistant"].rstrip()
        return RenderedConversation(plain(tokenizer, messages), before)
    from jinja2.exceptions import TemplateError

    try:
        return RenderedConversation(
            tokenizer.apply_chat_template(messages, tokenize=False),
            tokenizer.apply_chat_template(
                messages[:-1], tokenize=False, add_generation_prompt=True
            ),
        )
    except TemplateError as error:
        raise SteerError(
            f"{conversation.location}: the chat template does not take these messages ({error}); "
            "change them, or do without the template"
        ) from error


def plain(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """Messages without a chat template, each on a line of its own."""
    lines = [f"{_NAMES.get(m['role'], '')}{m['content'].strip()}\n" for m in messages]
    return (tokenizer.bos_token or "") + "".join(lines)


def answer_tokens(
    tokenizer: Any,
    conversation: Conversation,
    *,
    max_tokens: int = 16,
    max_length: int = 1024,
    chat_template: bool = True,
) -> SelectedTokens:
    """A conversation's tokens, and which of them a probe is fitted to; none of a short answer."""
    rendered = render(tokenizer, conversation, chat_template=chat_template)
    ids = ids_of(tokenizer, rendered.text)
    start = answer_start(ids_of(tokenizer, rendered.before), ids)
    # Room for as many tokens as are asked for, and the one that is dropped.
    ids = ids[: start + max(LONGEST_ANSWER, max_tokens + 1)]
    dropped = max(0, len(ids) - max_length)
    ids, start = ids[dropped:], max(0, start - dropped)
    return SelectedTokens(ids, range(start, max(start, len(ids) - 1))[:max_tokens])


def answer_start(before: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens two texts have in common before they part."""
    for position, (token_before, token) in enumerate(zip(before, ids, strict=False)):
        if token_before != token:
            return position
    return min(len(before), len(ids))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text as it stands."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
