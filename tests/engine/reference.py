"""An independent forward pass: Hugging Face in float64, the paper's formula written out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from vllm_steer import LMSteer


def load_reference(path: Path | str) -> Any:
    """The model in float64, so that it is no source of error. Load it before the engine starts:
    vLLM's Transformers backend changes the classes of the models it serves.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    model.base_model.do_not_compile = True  # for that backend's decorator, now on the class
    return model


@torch.no_grad()
def steered_logprobs(
    model: Any, ids: Sequence[int], strengths: Mapping[str, float], steers: Mapping[str, LMSteer]
) -> torch.Tensor:
    """Log-probabilities ``[len(ids), vocab]`` of the token after each position."""
    hidden = model.base_model(torch.tensor([list(ids)])).last_hidden_state[0]
    steered = hidden.clone()
    offset = torch.zeros(model.config.vocab_size, dtype=torch.float64)
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
    if cap := getattr(model.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    logits /= getattr(model.config, "logits_scaling", 1.0)
    return torch.log_softmax(logits, dim=-1)


def assert_greedy(
    output: Any,
    model: Any,
    strengths: Mapping[str, float],
    steers: Mapping[str, LMSteer],
    *,
    tolerance: float = 1e-4,
) -> None:
    """Every generated token is the reference's choice after the same text, with its logprob; so are
    the logprobs of the prompt where the request asked for them.
    """
    prompt, completion = list(output.prompt_token_ids), output.outputs[0]
    generated = list(completion.token_ids)
    wanted = steered_logprobs(model, prompt + generated, strengths, steers)
    choices = wanted[len(prompt) - 1 : -1]
    assert generated == choices.argmax(-1).tolist()
    for step, token in enumerate(generated):
        given = completion.logprobs[step][token].logprob
        assert abs(given - float(choices[step, token])) <= tolerance
    for position, entry in enumerate(output.prompt_logprobs or []):
        if entry is None:
            continue
        token = prompt[position]
        assert abs(entry[token].logprob - float(wanted[position - 1, token])) <= tolerance
