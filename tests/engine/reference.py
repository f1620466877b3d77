"""An independent forward pass: Hugging Face in float64, the papers' formulas written out.

Every pass is over the whole sequence at once and without a KV cache. ``P`` is the prompt's length,
positions count from 0.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from reading_reference import change_of, holds, margin, open_doses, positions_of, reads
from wrapped_models import WRAPPED

from vllm_steer import DeltaSteer, LMSteer, Steer, VectorSteer
from vllm_steer.doses import Dose
from vllm_steer.steers import SAESteer


class Modules(NamedTuple):
    """Hugging Face's names: the list of blocks, and three modules of a block."""

    blocks: str = "model.layers"
    input_norm: str | None = "input_layernorm"
    attention: str = "self_attn"
    projection: str = "self_attn.o_proj"


class Media(NamedTuple):
    """What a prompt holds besides text: the model's own inputs for it, and the token that stands
    for each of its embeddings.
    """

    inputs: Mapping[str, torch.Tensor]
    placeholder: int
    types: str | None = None  # the input that says which tokens are placeholders

    def of(self, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """The inputs beside the token ids."""
        types = {} if self.types is None else {self.types: torch.tensor([self.where(ids)]).long()}
        return {**self.inputs, **types}

    def where(self, ids: Sequence[int]) -> list[bool]:
        """Which tokens are placeholders."""
        return [token == self.placeholder for token in ids]


MODULES = {
    **dict.fromkeys(WRAPPED, Modules("model.language_model.layers")),
    "Llama4ForConditionalGeneration": Modules("language_model.model.layers"),
    "GPT2LMHeadModel": Modules("transformer.h", "ln_1", "attn", "attn.c_proj"),
    "GPTNeoXForCausalLM": Modules(
        "gpt_neox.layers", "input_layernorm", "attention", "attention.dense"
    ),
    "Gemma2ForCausalLM": Modules(),
    "Gemma3ForCausalLM": Modules(),
    "GemmaForCausalLM": Modules(),
    "LlamaForCausalLM": Modules(),
    "MistralForCausalLM": Modules(),
    "MixtralForCausalLM": Modules(),
    "Olmo2ForCausalLM": Modules(input_norm=None),
    "OlmoForCausalLM": Modules(),
    "Phi3ForCausalLM": Modules(),
    "PhiForCausalLM": Modules(projection="self_attn.dense"),
    "Qwen2ForCausalLM": Modules(),
    "Qwen2MoeForCausalLM": Modules(),
    "Qwen3ForCausalLM": Modules(),
    "Qwen3MoeForCausalLM": Modules(),
}


def load_reference(path: Path | str) -> Any:
    """The model in float64, so that it is no source of error. Load it before the engine starts:
    vLLM's Transformers backend changes the classes of the models it serves.
    """
    (name,) = transformers.AutoConfig.from_pretrained(path).architectures
    auto = getattr(transformers, name) if name in WRAPPED else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(
        path,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",  # the others know no float64
    ).eval()
    model.base_model.do_not_compile = True  # for that backend's decorator, now on the class
    return model


@torch.no_grad()
def steered_logprobs(
    model: Any,
    ids: Sequence[int],
    strengths: Mapping[str, float],
    steers: Mapping[str, LMSteer],
    media: Media | None = None,
) -> torch.Tensor:
    """Log-probabilities ``[len(ids), vocab]`` of the token after each position."""
    config, hidden = model.config.get_text_config(), _head_input(model, ids, media)
    steered = hidden.clone()
    offset = torch.zeros(config.vocab_size, dtype=torch.float64)
    for name, strength in strengths.items():
        steer = steers[name]
        for column in range(steer.columns):
            scale = steer.epsilon * (1.0 if column in steer.fixed_columns else strength)
            if steer.variant == "multiply":
                w = steer.projector1[column].double() @ steer.projector2[column].double().T
                steered += scale * (hidden @ w)
            elif steer.variant == "add":
                steered += scale * steer.add[column].double()
            else:
                offset += scale * steer.offset[column].double()
    head = model.get_output_embeddings()
    logits = steered @ head.weight.T + offset
    if getattr(head, "bias", None) is not None:
        logits += head.bias
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    logits /= getattr(config, "logits_scaling", 1.0)
    return torch.log_softmax(logits, dim=-1)


def _head_input(model: Any, ids: Sequence[int], media: Media | None) -> torch.Tensor:
    """The input of the LM head at each position, ``[len(ids), hidden_size]``."""
    seen: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])):
        model(
            input_ids=torch.tensor([list(ids)]),
            use_cache=False,
            **({} if media is None else media.of(ids)),
        )
    return seen[0]


def guided_logprobs(
    model: Any,
    ids: Sequence[int],
    prompt_length: int,
    doses: Sequence[Dose],
    steers: Mapping[str, Steer],
    media: Media | None = None,
) -> torch.Tensor:
    """Log-probabilities ``[len(ids), vocab]`` of the token after each position, under doses of
    steers of every kind. A dose of strength 0 is no dose.
    """
    strong = [dose for dose in doses if dose.strength]
    if any(dose.gate for dose in strong):
        verdicts = prompt_verdicts(model, ids[:prompt_length], strong, steers)
        strong = open_doses(strong, verdicts)
    at_head: dict[str, float] = {}
    for dose in strong:
        if isinstance(steers[dose.steer], LMSteer):
            at_head[dose.steer] = at_head.get(dose.steer, 0.0) + dose.strength
    strengths = {name: strength for name, strength in at_head.items() if strength}
    with ExitStack() as hooks:
        text = Text(ids, prompt_length, media)
        for (layer, site), terms in _terms(strong, steers, text).items():
            hooks.callback(_hook(model, layer, site, terms).remove)
        return steered_logprobs(model, ids, strengths, steers, media)


@torch.no_grad()
def prompt_verdicts(
    model: Any, prompt: Sequence[int], doses: Sequence[Dose], steers: Mapping[str, Steer]
) -> dict[str, bool]:
    """Which conditions hold. Doses that they open steer the prompt's last token in later layers,
    where other conditions may be read: pass after pass, until nothing changes any more.
    """
    names = {name for dose in doses if dose.gate for name in dose.gate.conditions}
    conditions = {name: steers[name] for name in names}
    verdicts: dict[str, bool] = {}
    for _ in range(len(conditions) + 1):
        text, seen = Text(prompt, len(prompt), None), dict[str, torch.Tensor]()
        with ExitStack() as hooks:
            for name, condition in conditions.items():
                keep = partial(_keep, seen, name)
                handle = _hook(model, condition.layers[0], condition.site, [keep])
                hooks.callback(handle.remove)
            for (layer, site), terms in _terms(open_doses(doses, verdicts), steers, text).items():
                hooks.callback(_hook(model, layer, site, terms).remove)
            model(input_ids=torch.tensor([list(prompt)]), use_cache=False)
        for name, condition in conditions.items():
            assert margin(condition, seen[name]) > 1e-5, "a threshold that rounding may cross"
        found = {name: holds(condition, seen[name]) for name, condition in conditions.items()}
        if found == verdicts:
            return verdicts
        verdicts = found
    raise AssertionError("conditions that depend on each other")


class Text(NamedTuple):
    """A prompt and its answer."""

    ids: Sequence[int]
    prompt_length: int
    media: Media | None

    def positions(self, dose: Dose) -> list[int]:
        """The positions of a dose's phase."""
        if dose.phase != "text":
            return positions_of(dose.phase, len(self.ids), self.prompt_length)
        everything = range(len(self.ids))
        if self.media is None:
            return list(everything)
        placeholders = self.media.where(self.ids)
        return [position for position in everything if not placeholders[position]]


class Change(NamedTuple):
    """What one dose does at one site of one layer."""

    added: torch.Tensor  # [positions, width], 0 where the dose does not act
    rotates: torch.Tensor  # [positions], whether the result keeps the old norm


Term = Callable[[torch.Tensor], Change]
"""What one dose does to the activations ``[positions, width]`` of a site."""


def _keep(seen: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> Change:
    """Keep the activations of a site, and change nothing."""
    seen[name] = x
    return Change(torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool))


def guide(x: torch.Tensor, changes: Sequence[Change]) -> torch.Tensor:
    """``x + sum``, and ``(x + sum) |x| / |x + sum|`` at positions where some dose rotates."""
    moved = x + sum(change.added for change in changes)
    rescaled = moved * x.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
    rotates = torch.stack([change.rotates for change in changes]).any(dim=0)
    return torch.where(rotates[:, None], rescaled, moved)


def _terms(
    doses: Sequence[Dose], steers: Mapping[str, Steer], text: Text
) -> dict[tuple[int, str], list[Term]]:
    """All that doses do to a sequence, by layer and site."""
    terms: dict[tuple[int, str], list[Term]] = {}
    for dose in doses:
        steer = steers[dose.steer]
        if isinstance(steer, LMSteer):
            continue
        of_layer = _vector_term if isinstance(steer, VectorSteer) else _delta_term
        if reads(steer) or isinstance(steer, SAESteer):
            of_layer = _reading_term
        for layer in steer.layers if dose.layers is None else dose.layers:
            term = of_layer(dose, steer, steer.layers.index(layer), text)
            terms.setdefault((layer, steer.site), []).append(term)
    return terms


def _reading_term(dose: Dose, steer: Any, row: int, text: Text) -> Term:
    def term(x: torch.Tensor) -> Change:
        added = torch.zeros_like(x)
        for position in text.positions(dose):
            added[position] = change_of(dose, steer, row, x[position])
        return Change(added, torch.zeros(len(x), dtype=torch.bool))

    return term


def _vector_term(dose: Dose, steer: VectorSteer, row: int, text: Text) -> Term:
    """``v w`` or, of a rotating steer, ``v w / |w|``, at every position of the phase."""
    w = steer.vectors[row].double()
    if steer.mode == "rotate":
        w = w / w.norm()
    added = torch.zeros(len(text.ids), steer.hidden_size, dtype=torch.float64)
    rotates = torch.zeros(len(text.ids), dtype=torch.bool)
    for position in text.positions(dose):
        added[position] = dose.strength * w
        rotates[position] = steer.mode == "rotate"
    return lambda _: Change(added, rotates)


def _delta_term(dose: Dose, steer: DeltaSteer, row: int, text: Text) -> Term:
    """``a_i Delta_i`` at position ``P - 1 + i`` of the phase, for every step ``i`` of the steer."""
    added = torch.zeros(len(text.ids), steer.hidden_size, dtype=torch.float64)
    for position in text.positions(dose):
        step = position - (text.prompt_length - 1)
        if 0 <= step < steer.steps:
            added[position] = _coefficient(dose, steer, step) * steer.delta[step, row].double()
    return lambda _: Change(added, torch.zeros(len(text.ids), dtype=torch.bool))


def _coefficient(dose: Dose, steer: DeltaSteer, step: int) -> float:
    return {
        "fixed": dose.strength,
        "start": dose.strength if step == 0 else 0.0,
        "dim": dose.strength * (1 - step / steer.steps),
    }[dose.schedule or steer.schedule]


def _hook(model: Any, layer: int, site: str, terms: Sequence[Term]) -> Any:
    """Guide the activations at a site with a hook; returns its handle."""
    names = MODULES[type(model).__name__]
    block = model.get_submodule(names.blocks)[layer]
    if site == "heads":
        projection = block.get_submodule(names.projection)
        return projection.register_forward_pre_hook(lambda _, args: (_guided(args[0], terms),))
    if site == "resid":
        module = block
    elif site == "attn_out":
        module = block.get_submodule(names.attention)
    else:
        assert site == "attn_in" and names.input_norm, f"{type(model).__name__} has no {site}"
        module = block.get_submodule(names.input_norm)
    return module.register_forward_hook(lambda _module, _args, output: _guided(output, terms))


def _guided(output: Any, terms: Sequence[Term]) -> Any:
    """A module's tensor, or the first of its tuple, guided."""
    if isinstance(output, tuple):
        return (_guided(output[0], terms), *output[1:])
    assert output.shape[0] == 1 and output.dtype == torch.float64
    return guide(output[0], [term(output[0]) for term in terms])[None]


def assert_greedy(
    output: Any,
    model: Any,
    strengths: Mapping[str, float],
    steers: Mapping[str, LMSteer],
    *,
    tolerance: float = 1e-4,
) -> None:
    """Every generated token is the reference's choice after the same text, with its logprob; the
    same holds for the logprobs of the prompt if requested.
    """
    _assert_choices(output, steered_logprobs(model, _text(output), strengths, steers), tolerance)


def assert_guided(
    output: Any,
    model: Any,
    doses: Sequence[Dose],
    steers: Mapping[str, Steer],
    *,
    tolerance: float = 1e-4,
    media: Media | None = None,
) -> None:
    """``assert_greedy`` for doses of steers of every kind."""
    prompt_length = len(output.prompt_token_ids)
    expected = guided_logprobs(model, _text(output), prompt_length, doses, steers, media)
    _assert_choices(output, expected, tolerance)


def assert_as_near_as_unsteered(
    outputs: Sequence[Any],
    model: Any,
    settings: Sequence[Mapping[str, Any]],
    steers: Mapping[str, Steer],
    *,
    clear_share: float = 0.5,
) -> None:
    """For an engine whose own rounding is larger than a tolerance: under each setting it is at most
    twice as far from the reference as under none, and under more than ``clear_share`` of those that
    act it is farther than that from the unsteered reference.
    """
    from engines import doses_of

    def difference(output: Any, doses: Sequence[Dose]) -> float:
        ids, prompt = _text(output), list(output.prompt_token_ids)
        expected = guided_logprobs(model, ids, len(prompt), doses, steers)[len(prompt) - 1 : -1]
        tokens = torch.tensor(output.outputs[0].token_ids)
        steps = zip(tokens.tolist(), output.outputs[0].logprobs, strict=True)
        actual = torch.tensor([step[token].logprob for token, step in steps])
        return float((expected.gather(1, tokens[:, None])[:, 0] - actual).abs().max())

    pairs = list(zip(outputs, settings, strict=True))
    clear = []
    own = max(difference(output, []) for output, setting in pairs if not setting)
    for output, setting in pairs:
        doses = doses_of(setting, steers)
        assert (steered := difference(output, doses)) <= 2 * own, (setting, steered, own)
        if doses and all(dose.strength for dose in doses):
            clear.append(difference(output, []) > 2 * own)
    assert sum(clear) > len(clear) * clear_share


def _text(output: Any) -> list[int]:
    return [*output.prompt_token_ids, *output.outputs[0].token_ids]


def _assert_choices(output: Any, expected: torch.Tensor, tolerance: float) -> None:
    prompt, completion = list(output.prompt_token_ids), output.outputs[0]
    generated = list(completion.token_ids)
    choices = expected[len(prompt) - 1 : -1]
    assert generated == choices.argmax(-1).tolist()
    for step, token in enumerate(generated):
        actual = completion.logprobs[step][token].logprob
        assert abs(actual - float(choices[step, token])) <= tolerance
    for position, entry in enumerate(output.prompt_logprobs or []):
        if entry is None:
            continue
        token = prompt[position]
        assert abs(entry[token].logprob - float(expected[position - 1, token])) <= tolerance
