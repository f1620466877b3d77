"""The tokens that two models have in common."""

from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_steer.errors import SteerError


@dataclass(frozen=True, eq=False)
class SharedVocabulary:
    """Tokens of one string in both vocabularies, in the order of their number in the source."""

    tokens: tuple[str, ...] = field(repr=False)
    source_ids: torch.Tensor = field(repr=False)  # [shared] int64, ascending
    target_ids: torch.Tensor = field(repr=False)  # [shared] int64

    def __len__(self) -> int:
        return len(self.tokens)


def shared_vocabulary(
    source_tokenizer: Any, target_tokenizer: Any, *, source_rows: int, target_rows: int
) -> SharedVocabulary:
    """The shared tokens whose numbers both output embeddings have a row for.

    They are sorted by number: a tokenizer's table has no order of its own, and where the merges of
    a BPE are numbered as they were found, the first tokens are the most frequent.

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
