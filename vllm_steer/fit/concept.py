"""Fit a concept vector: a linear probe per layer, between answers with and without a concept.

Every selected token of an answer (``answer_tokens``) is a row with the answer's label; ``probes``
fits the probes and computes their accuracies. All answers to one prompt are in the same part:
prompts are shuffled, and the prompts of the first 80% of the answers are the training data.

Source: von Ruette et al., "A Language Model's Guide Through Latent Space", ICML 2024
(arXiv 2402.14433), section 3 and the authors' training script.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import torch

from vllm_steer.errors import SteerError
from vllm_steer.fit.activations import all_layers, context_length, read_tokens
from vllm_steer.fit.answer_tokens import answer_tokens
from vllm_steer.fit.probes import FIT, PROBES, Labels, Probe, ProbeKind, accuracy, oriented
from vllm_steer.fit.token_store import TokenStore, token_store
from vllm_steer.optional import require_package
from vllm_steer.steers import VectorSteer
from vllm_steer.steers.checks import check_choice
from vllm_steer.steers.sites import VECTOR_SITES, VectorSite
from vllm_steer.texts.conversations import Conversation

Select = Literal["train", "validation"]
SELECTS: tuple[Select, ...] = get_args(Select)
TRAIN_SHARE: Final = 0.8


@dataclass(frozen=True)
class LayerProbe:
    """The probe of one layer and the share of tokens that it classifies correctly."""

    layer: int
    probe: Probe
    train_accuracy: float
    validation_accuracy: float | None  # None without validation data


@dataclass(frozen=True)
class ConceptFit:
    """The steer of the selected layers, and the probes of all layers that were read."""

    steer: VectorSteer
    probes: tuple[LayerProbe, ...]
    train_answers: int
    validation_answers: int
    train_tokens: int
    validation_tokens: int


@dataclass(frozen=True)
class _DataSplit:
    """The answers of one part of the data, the tokens of each, and the position of their rows."""

    rows: slice
    labels: Labels  # [tokens]
    lengths: tuple[int, ...]


def fit_concept(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    probe: ProbeKind = "dim",
    site: VectorSite = "attn_in",
    layers: Sequence[int] | None = None,
    top_k: int | None = None,
    select: Select = "train",
    signed: bool = False,
    max_tokens: int = 16,
    max_length: int = 1024,
    chat_template: bool = True,
    batch_size: int = 16,
    seed: int = 0,
    folder: Path | None = None,
    on_answer: Callable[[int], None] | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> ConceptFit:
    """A steer ``[layers, hidden_size]``, float32, that rotates towards label 1.

    ``layers`` None reads every layer, ``top_k`` keeps the best of them by ``select``: all layers
    that reach the ``top_k``-th largest accuracy, so ties can keep more. ``signed`` orients each row
    of a ``pca`` probe towards label 1; its sign is arbitrary otherwise. The steer's
    ``layer_scores`` are the accuracies in training. The model reads each answer once; the rows are
    stored on disk in ``folder`` (about ``4 tokens layers hidden_size`` bytes) and read back one
    layer at a time. The same ``seed`` gives the same split and the same probes. ``on_answer`` is
    called with the number of answers read so far, ``on_layer`` with the number of layers fitted.

    Raises ``SteerError`` for an unknown probe, site or layer, training answers without a selected
    token for one of the labels, and a selection by validation without validation data.
    """
    check_choice("probe", probe, PROBES)
    check_choice("site", site, VECTOR_SITES)
    check_choice("select", select, SELECTS)
    require_package("sklearn")  # an error before the work, not after it
    chosen = tuple(sorted(all_layers(model) if layers is None else layers))
    if top_k is not None:
        _check_top_k(top_k, len(chosen))
    if signed and probe != "pca":
        raise SteerError(f"signed means nothing for a {probe} probe: it points to label 1 already")
    train, validation = split(conversations, seed)
    length = context_length(model, max_length)

    def read(part: Sequence[Conversation]) -> Iterator[torch.Tensor]:
        encoded = (
            answer_tokens(
                tokenizer,
                conversation,
                max_tokens=max_tokens,
                max_length=length,
                chat_template=chat_template,
            )
            for conversation in part
        )
        return read_tokens(model, encoded, site=site, layers=chosen, batch_size=batch_size)

    with token_store(len(chosen), folder) as store:
        parts = list(_stored(store, (train, validation), read, on_answer))
        _check_both_labels(parts[0])
        probes = []
        for index, layer in enumerate(chosen):
            probes.append(_fit_layer(layer, store.layer(index), parts, probe, signed, seed))
            if on_layer is not None:
                on_layer(len(probes))
    steer = VectorSteer(
        vectors=torch.tensor(
            np.stack([layer_probe.probe.direction for layer_probe in probes])
        ).float(),
        layers=chosen,
        site=site,
        mode="rotate",
        layer_scores=tuple(layer_probe.train_accuracy for layer_probe in probes),
        base_model=model.config.name_or_path,
    )
    return ConceptFit(
        steer=steer if top_k is None else steer.keep_layers(best_layers(probes, top_k, select)),
        probes=tuple(probes),
        train_answers=len(train),
        validation_answers=len(validation),
        train_tokens=len(parts[0].labels),
        validation_tokens=len(parts[1].labels),
    )


def split(
    conversations: Sequence[Conversation], seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Split into training and validation data, each in the original order; no prompt is in both."""
    counts = Counter(conversation.prompt for conversation in conversations)
    prompts = list(counts)
    random.Random(seed).shuffle(prompts)
    num_wanted, num_answers, training_prompts = int(TRAIN_SHARE * len(conversations)), 0, set()
    for prompt in prompts:
        if num_answers >= num_wanted:
            break
        training_prompts.add(prompt)
        num_answers += counts[prompt]
    return (
        [conversation for conversation in conversations if conversation.prompt in training_prompts],
        [
            conversation
            for conversation in conversations
            if conversation.prompt not in training_prompts
        ],
    )


def best_layers(probes: Sequence[LayerProbe], top_k: int, select: Select) -> tuple[int, ...]:
    """The layers whose accuracy is at least the ``top_k``-th largest; equal ones are all kept."""
    _check_top_k(top_k, len(probes))
    scores = {
        layer_probe.layer: layer_probe.train_accuracy
        if select == "train"
        else layer_probe.validation_accuracy
        for layer_probe in probes
    }
    known_scores = {layer: score for layer, score in scores.items() if score is not None}
    if not known_scores:
        raise SteerError(
            "there is no answer to validate with: all have the prompts of the training; give "
            "answers to more prompts, or select by train"
        )
    threshold = sorted(known_scores.values(), reverse=True)[top_k - 1]
    return tuple(layer for layer, score in known_scores.items() if score >= threshold)


def _stored(
    store: TokenStore,
    parts: Sequence[Sequence[Conversation]],
    read: Callable[[Sequence[Conversation]], Iterator[torch.Tensor]],
    on_answer: Callable[[int], None] | None,
) -> Iterator[_DataSplit]:
    """Write the rows of each part to the store in sequence; return their positions."""
    num_read = 0
    for part in parts:
        start, lengths = store.count, []
        for rows in read(part):
            store.add(rows)
            lengths.append(len(rows))
            num_read += 1
            if on_answer is not None:
                on_answer(num_read)
        labels = np.repeat([conversation.label for conversation in part], lengths).astype(int)
        yield _DataSplit(slice(start, store.count), labels, tuple(lengths))


def _fit_layer(
    layer: int, x: Any, parts: Sequence[_DataSplit], kind: ProbeKind, signed: bool, seed: int
) -> LayerProbe:
    train = parts[0]
    probe = FIT[kind](x[train.rows], train.labels, seed)
    if signed:
        probe = oriented(probe)
    scores = [accuracy(probe, x[part.rows], part.labels, part.lengths) for part in parts]
    return LayerProbe(layer, probe, scores[0] or 0.0, scores[1])


def _check_top_k(top_k: int, layers: int) -> None:
    if not 1 <= top_k <= layers:
        raise SteerError(f"top_k is {top_k}; there are {layers} layers to choose from")


def _check_both_labels(train: _DataSplit) -> None:
    counts = [int((train.labels == label).sum()) for label in (0, 1)]
    if not all(counts):
        raise SteerError(
            f"the answers for training have {counts[0]} tokens of label 0 and {counts[1]} of label "
            "1; both are needed: give more answers to more prompts (an answer of one token has "
            "none that counts)"
        )
