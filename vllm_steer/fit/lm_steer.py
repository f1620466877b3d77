"""Fit an LM-Steer: maximum likelihood of every text under its own signed steer.

``objective`` has the objective. The model is frozen and the steer acts after its last layer, so the
model reads each text once; a training step then costs the LM head only.

Source: Han et al., "Word Embeddings Are Steers for Language Models", ACL 2024
(arXiv 2305.12798), section 3; the recipe is that of the authors' training script.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from vllm_steer.fit import training_run
from vllm_steer.fit.encoded_texts import draw_batches, encode_texts
from vllm_steer.fit.head_loss import check_head
from vllm_steer.fit.lm_steer_settings import FitCallbacks, LMSteerSettings, check_labels
from vllm_steer.fit.lm_steer_training import FitInputs, train
from vllm_steer.fit.recipe import recipe
from vllm_steer.fit.training_run import TrainingState
from vllm_steer.hf.language_model import evaluation_mode
from vllm_steer.hf.lm_head import head_of
from vllm_steer.steers import LMSteer
from vllm_steer.steers.lm_steer import Variant

CACHE_BYTES: Final = 16 << 30


def fit_lm_steer(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[float],
    *,
    variant: Variant = "multiply",
    rank: int = 1000,
    epsilon: float = 1e-3,
    initial_scale: float = 1e-2,
    steps: int = 1000,
    batch_size: int = 32,
    learning_rate: float = 1e-2,
    regularization: float = 0.0,
    max_length: int = 256,
    dummy: bool = True,
    mask_padding: bool = True,
    seed: int = 0,
    cache_bytes: int = CACHE_BYTES,
    run_folder: str | Path | None = None,
    restart: bool = False,
    checkpoint_every: int = 100,
    callbacks: FitCallbacks | None = None,
) -> LMSteer:
    """The steer under which each text is most likely at its label's strength.

        minimise  mean_t -log p(x_{t+1} | x_{..t}, v)  +  regularization * sum of squares

    over the tokens ``t`` of a batch of texts, ``v`` a text's label in column 0 and, with ``dummy``,
    1 in column 1, which takes up what all the texts have in common. ``labels`` lie in [-1, 1]:
    strength +1 is fitted to the texts labelled 1, strength -1 to those labelled -1, and a larger
    strength is allowed at generation (the paper uses +-5). Adam, no schedule.

    Shapes of what is trained: projectors ``[columns, hidden_size, rank]`` from ``initial_scale``
    N(0, 1); for the variants ``add`` ``[columns, hidden_size]`` and ``offset`` ``[columns, vocab]``
    from N(0, 1), without ``initial_scale``. They are float32 (float64 for a float64 model); the
    model is unchanged. ``mask_padding=False`` also trains on the end-of-text tokens that fill a
    batch's texts up to its longest, as the authors' script does.

    The model's hidden states are stored on disk, in its dtype, if they take at most
    ``cache_bytes``, and are recomputed for each batch otherwise. With a ``run_folder`` an
    interrupted fit continues from its last checkpoint, with bit-identical results, unless
    ``restart``; the folder keeps ``loss.csv``. A checkpoint is written every ``checkpoint_every``
    steps and at least every minute. The last one stays until ``training_run.finish_run``, so the
    trained parameters are not lost if the steer cannot be written.

    Raises ``SteerError`` for no texts, labels that are not one per text, out of [-1, 1] or all the
    same, an invalid setting, a model with an unknown head, a run folder of other settings, a file
    that cannot be written, and a NaN loss (with its step).
    """
    settings = LMSteerSettings(
        variant=variant,
        rank=rank,
        epsilon=epsilon,
        initial_scale=initial_scale,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        regularization=regularization,
        max_length=max_length,
        dummy=dummy,
        mask_padding=mask_padding,
        seed=seed,
    )
    check_labels(texts, labels)
    encoded = encode_texts(tokenizer, texts, max_length=max_length)
    batches = draw_batches(
        encoded, batch_size=batch_size, steps=steps, mask_padding=mask_padding, seed=seed
    )
    fit = FitInputs(model, head_of(model), encoded, batches, labels, settings)
    with evaluation_mode(model):
        check_head(model, fit.head, encoded.rows[batches[0].rows[0]])
        run = None
        if run_folder is not None:
            run_settings = {**asdict(settings), "texts": training_run.digest(texts, labels)}
            run = training_run.Checkpoints(
                Path(run_folder), run_settings, checkpoint_every, restart
            )
        training = train(fit, run, cache_bytes=cache_bytes, callbacks=callbacks or FitCallbacks())
    return _steer(fit, training)


def _steer(fit: FitInputs, training: TrainingState) -> LMSteer:
    settings, name = fit.settings, str(fit.model.config.name_or_path)
    rows_used = {row for batch in fit.batches for row in batch.rows}
    figures = {
        "texts": len(fit.encoded.rows),
        "texts_used": len(rows_used),
        "tokens_seen": sum(sum(batch.counts) for batch in fit.batches),
        "first_loss": training.losses[0],
        "final_loss": training.losses[-1],
    }
    trained: dict[str, Any] = {
        key: value.detach().cpu() for key, value in training.parameters.items()
    }
    return LMSteer(
        variant=settings.variant,
        epsilon=settings.epsilon,
        hidden_size=fit.head.weight.shape[1],
        fixed_columns=(1,) if settings.dummy else (),
        base_model=name,
        recipe=recipe("lm-steer", model=name, data=(), settings=asdict(settings), figures=figures),
        **trained,
    )
