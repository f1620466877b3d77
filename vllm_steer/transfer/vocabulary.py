"""The tokens that two models share."""

from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_steer.errors import SteerError


@dataclass(frozen=True, eq=False)
class SharedVocabulary:
    """Tokens with the same string in both vocabularies, ordered by their id in the source.

    ``source_ids`` and ``target_ids`` are ``[shared]`` int64; the former ascend.
    """

    tokens: tuple[str, ...] = field(repr=False)
    source_ids: torch.Tensor = field(repr=False)  # [shared] int64, ascending
    target_ids: torch.Tensor = field(repr=False)  # [shared] int64

    def __len__(self) -> int:
        return len(self.tokens)


def shared_vocabulary(
    source_tokenizer: Any, target_tokenizer: Any, *, source_rows: int, target_rows: int
) -> SharedVocabulary:
    """The shared tokens whose ids are rows of both output embeddings.

    They are sorted by id: a tokenizer's table is unordered, and in a BPE vocabulary low ids are the
    most frequent tokens.

    Raises ``SteerError`` if there are none.
    """
    source, target = source_tokenizer.get_vocab(), target_tokenizer.get_vocab()
    shared = sorted(
        (number, target[token], token)
        for token, number in source.items()
        if number < source_rows and target.get(token, target_rows) < target_rows
    )
    if not shared:
        raise SteerError(
            "the two vocabularies share no token, so no map between the models can be fitted; "
            "expected tokenizers of one kind (byte-level BPE, SentencePiece)"
        )
    source_ids, target_ids, tokens = zip(*shared, strict=True)
    return SharedVocabulary(tokens, torch.tensor(source_ids), torch.tensor(target_ids))
