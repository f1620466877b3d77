"""Fit a low-rank map inside the layers: maximum likelihood of answers, or of texts, under the map.

    minimise  mean_t -log p(x_t | x_<t; h + v B (A h + b))

over the scored tokens ``t``: those of the answers, or all tokens of plain texts. ``low_rank_maps``
has the parameterizations of ``A``, ``B`` and ``b``.

Source: Wu et al., "ReFT: Representation Finetuning for Language Models", NeurIPS 2024
(arXiv 2404.03592), section 3.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from vllm_steer.errors import SteerError
from vllm_steer.fit import training_run
from vllm_steer.fit.activations import context_length
from vllm_steer.fit.head_loss import check_head
from vllm_steer.fit.lm_steer_settings import FitCallbacks
from vllm_steer.fit.low_rank_maps import Factors, Parameterization, factors
from vllm_steer.fit.low_rank_settings import LowRankSettings
from vllm_steer.fit.low_rank_training import (
    LowRankFit,
    TrainingText,
    mean_loss,
    train,
    training_text,
)
from vllm_steer.fit.recipe import recipe
from vllm_steer.fit.scored_texts import TextEncoding, encode_scored
from vllm_steer.fit.training_run import TrainingState
from vllm_steer.fit.vector import Text
from vllm_steer.hf import sites
from vllm_steer.hf.language_model import evaluation_mode, text_config
from vllm_steer.hf.lm_head import head_of
from vllm_steer.steers import LowRankSteer
from vllm_steer.steers.sites import VectorSite


def fit_low_rank(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    strengths: Sequence[float] | None = None,
    *,
    parameterization: Parameterization = "loreft",
    rank: int = 4,
    layers: Sequence[int] | None = None,
    site: VectorSite = "resid",
    phase: str | Mapping[str, Any] = "all",
    steps: int = 200,
    batch_size: int = 16,
    learning_rate: float = 4e-3,
    weight_decay: float = 0.0,
    valid_share: float = 0.1,
    max_length: int = 256,
    chat_template: bool = False,
    end_of_text: bool = True,
    seed: int = 0,
    run_folder: str | Path | None = None,
    restart: bool = False,
    checkpoint_every: int = 100,
    callbacks: FitCallbacks | None = None,
) -> LowRankSteer:
    """The map under which the answers, or the texts, are most likely at strength 1.

        h <- h + v B (A h + b)

    A text is a string, all of whose tokens but the first are scored, or a prompt and its answer, of
    which the answer's are. ``strengths`` has the ``v`` of each text, 1 by default: a text of -1 is
    made likely at strength -1, as in an LM-Steer.

    ``parameterization`` is ``loreft`` (``A = W - R``, ``B = R^T`` with orthonormal rows ``R``),
    ``direft`` (``A = W1``, ``B = W2^T``) or ``lm-steer`` (``A = P1^T``, ``B = P2``, no ``b``). The
    map starts as the identity. AdamW, with a learning rate that falls to zero; the gradient goes to
    the map's parameters alone, which are float32 (float64 for a float64 model), and the model is
    unchanged. Shapes of the steer: ``a`` ``[layers, rank, hidden_size]``, ``b``
    ``[layers, hidden_size, rank]``, ``bias`` ``[layers, rank]``.

    ``layers`` None takes the middle one. ``phase`` are the tokens that the map acts on, a phase of
    requests or windows such as ``{"prompt": [":7", "-7:"]}``; a steer file does not hold it, so
    requests give the same. ``valid_share`` of the texts is held out: the recipe's figures have
    their mean loss per scored token before (the model's own) and after, and the training loss of
    the first and of the last step. ``max_length`` bounds the tokens of a text; ``chat_template``
    and ``end_of_text`` are those of ``TextEncoding``. The same arguments give the same map.
    ``run_folder``, ``restart``, ``checkpoint_every`` and ``callbacks`` are those of
    ``fit_lm_steer``.

    Raises ``SteerError`` for no texts, strengths that are not one per text, 0 or not finite, an
    invalid setting, a rank above the hidden size, a layer or site that the model lacks, a phase
    that acts on no token, a prompt without room for its answer, a model with an unknown head, a run
    folder of other settings, a file that cannot be written, and a loss that is not finite (with its
    step).

    Source: see the module.

    >>> from vllm_steer.fit import fit_low_rank
    >>> from vllm_steer.models import load_language_model
    >>> small = load_language_model("embedded")
    >>> texts = [("Hotel Astoria:", " Quel charme !"), ("Film Nova:", " Un triomphe !")]
    >>> steer = fit_low_rank(small.model, small.tokenizer, texts, rank=2, steps=3, valid_share=0)
    >>> steer.layers, tuple(steer.a.shape)
    ((2,), (1, 2, 128))
    """
    settings = LowRankSettings(
        parameterization=parameterization,
        rank=rank,
        layers=None if layers is None else tuple(sorted(layers)),
        site=site,
        phase=phase,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        valid_share=valid_share,
        max_length=max_length,
        chat_template=chat_template,
        end_of_text=end_of_text,
        seed=seed,
    )
    callbacks = callbacks or FitCallbacks()
    strengths = [1.0] * len(texts) if strengths is None else list(map(float, strengths))
    _check_strengths(texts, strengths)
    chosen = _chosen_layers(model, settings)
    parts = _split(_encoded(model, tokenizer, texts, strengths, settings), settings)
    width = int(text_config(model).hidden_size)
    fit = LowRankFit(model, head_of(model), parts.train, parts.valid, chosen, width, settings)
    run = None
    if run_folder is not None:
        run_settings = {**_plain(settings), "texts": training_run.digest(_joined(texts), strengths)}
        run = training_run.Checkpoints(Path(run_folder), run_settings, checkpoint_every, restart)
    with evaluation_mode(model):
        check_head(model, fit.head, parts.train[0].scored.ids)
        on_text = callbacks.on_text
        before = mean_loss(fit, fit.valid, None, on_text) if fit.valid else None
        training = train(fit, run, callbacks)
        maps = factors(training.parameters)
        after = mean_loss(fit, fit.valid, maps, on_text) if fit.valid else None
    return _steer(fit, training, maps, {"valid_loss_before": before, "valid_loss_after": after})


class _Parts(NamedTuple):
    train: list[TrainingText]
    valid: list[TrainingText]


def _check_strengths(texts: Sequence[Text], strengths: Sequence[float]) -> None:
    if not texts or len(texts) != len(strengths):
        raise SteerError(
            f"{len(texts)} texts and {len(strengths)} strengths; give at least one text, and one "
            "strength for each or none at all"
        )
    wrong = [strength for strength in strengths if not abs(strength) < float("inf") or not strength]
    if wrong:
        raise SteerError(
            f"a text has strength {wrong[0]}; expected finite numbers other than 0, at which a map "
            "does nothing: leave such texts out"
        )


def _chosen_layers(model: Any, settings: LowRankSettings) -> tuple[int, ...]:
    """The layers to fit; ``SteerError`` for a layer, site or rank that the model cannot have."""
    names, blocks = sites.family(model), sites.layers_of(model)
    chosen = (len(blocks) // 2,) if settings.layers is None else settings.layers
    sites.check_layers_exist(chosen, len(blocks))
    for layer in chosen:
        sites.site_module(blocks[layer], names, settings.site)
    width = int(text_config(model).hidden_size)
    if settings.rank > width:
        raise SteerError(
            f"rank is {settings.rank}; the site {settings.site} of this model is {width} wide, and "
            "a map has at most that rank"
        )
    return chosen


def _encoded(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    strengths: Sequence[float],
    settings: LowRankSettings,
) -> list[TrainingText]:
    """The texts that have something to predict; ``SteerError`` for none."""
    if settings.phase != "all" and any(isinstance(text, str) for text in texts):
        raise SteerError(
            f"phase is {settings.phase!r}, and texts without a prompt have no such part; give "
            "prompts with answers, or the phase all"
        )
    encoding = TextEncoding(
        context_length(model, settings.max_length), settings.chat_template, settings.end_of_text
    )
    encoded = []
    for text, strength in zip(texts, strengths, strict=True):
        scored = encode_scored(tokenizer, text, encoding)
        if scored is not None:
            encoded.append(training_text(scored, strength, settings))
    if not encoded:
        raise SteerError(
            f"none of the {len(texts)} texts has two tokens, so there is nothing to predict"
        )
    if not any(text.strengths[:-1].any() for text in encoded):
        raise SteerError(
            f"the phase {settings.phase!r} acts on no token before the last of any text; give "
            "another phase"
        )
    return encoded


def _split(encoded: Sequence[TrainingText], settings: LowRankSettings) -> _Parts:
    """The texts in random order, some of them held out."""
    shuffled = random.Random(settings.seed).sample(encoded, len(encoded))
    num_valid = max(1, round(settings.valid_share * len(encoded))) if settings.valid_share else 0
    if num_valid >= len(encoded):
        raise SteerError(
            f"{len(encoded)} texts, of which valid_share {settings.valid_share} holds out "
            f"{num_valid}: none is left to fit to; give more texts, or valid_share 0"
        )
    return _Parts(shuffled[num_valid:], shuffled[:num_valid])


def _plain(settings: LowRankSettings) -> dict[str, Any]:
    """The settings as JSON values."""
    values = asdict(settings)
    return {**values, "layers": None if settings.layers is None else list(settings.layers)}


def _joined(texts: Sequence[Text]) -> list[str]:
    return [text if isinstance(text, str) else "\n\0".join(text) for text in texts]


def _steer(
    fit: LowRankFit,
    training: TrainingState,
    maps: Factors,
    held_out: Mapping[str, float | None],
) -> LowRankSteer:
    figures = {
        "train_texts": len(fit.train),
        "valid_texts": len(fit.valid),
        "scored_tokens": sum(text.scored.num_scored for text in fit.train),
        "first_loss": training.losses[0],
        "final_loss": training.losses[-1],
        **held_out,
    }
    name = str(fit.model.config.name_or_path)
    settings = _plain(fit.settings)
    return LowRankSteer(
        a=maps.a.cpu(),
        b=maps.b.contiguous().cpu(),
        bias=None if maps.bias is None else maps.bias.cpu(),
        layers=fit.layers,
        site=fit.settings.site,
        base_model=name,
        recipe=recipe("low-rank", model=name, data=(), settings=settings, figures=figures),
    )
