"""One architecture: the self-test's verdict, and the distance from Hugging Face where it serves."""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from benchmarks.architectures.tiny_models import HIDDEN, LAYERS, VOCAB, save_tiny_model

SITES: Final = ("resid", "attn_in", "attn_out")
_NORMS: Final = (
    *("input_layernorm", "ln_1", "self_attn_layer_norm", "ln_attn", "operator_norm"),
    *("attention_layernorm", "attention_norm", "norm", "pre_mixer_norm", "norm_1"),
)
_ATTENTION: Final = re.compile("Attention|Mixer|Mamba|DeltaNet|ShortConv")
_PROMPT_TOKENS: Final = 12
_UNSTEERED: Final = 1e-3


def verdict_of(architecture: str) -> dict[str, Any]:
    """A line of the results: ``state``, and what belongs to it.

    not made     Transformers does not have the architecture, or no tiny model came out
    not started  vLLM does not run the tiny model on this machine
    refused      no site inside the layers can be steered
    served       by site its layers, the reasons for others, the distance from Hugging Face
    """
    line: dict[str, Any] = {"architecture": architecture}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            model = save_tiny_model(architecture, folder / "model")
        except Exception as error:
            return {**line, "state": "not made", "reason": _short(error)}
        # vLLM's Transformers backend changes the classes of the model that it serves.
        reference = _Reference.of(model)
        try:
            sites = _self_test(folder / "model")
        except Exception as error:
            return {**line, "state": "not started", "reason": _short(error)}
        if sites is None:
            return {**line, "state": "refused", "reason": "the decoder layers are not found"}
        line |= {"state": "served" if _served(sites) else "refused", "sites": sites}
        if not _served(sites):
            return line
        try:
            line["compared"] = _compare(reference, folder, _served(sites))
        except Exception as error:
            line["not compared"] = _short(error)
    return line


def _served(sites: Mapping[str, Any]) -> list[str]:
    return [site for site in SITES if sites[site]["layers"]]


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _options(folder: Path) -> dict[str, Any]:
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "language_model_only": True,
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
    }


@contextmanager
def _engine(folder: Path, steers: Mapping[str, Any]) -> Iterator[Any]:
    from vllm import LLM

    llm = LLM(**_options(folder), additional_config={"steer": {"steers": dict(steers)}})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def _self_test(folder: Path) -> dict[str, Any] | None:
    """The report of an engine that steers at the LM head only."""
    from vllm_steer import LMSteer, save_steer

    path = folder.parent / "head.safetensors"
    zero = torch.zeros(1, HIDDEN)
    save_steer(LMSteer(variant="add", add=zero, epsilon=1.0, hidden_size=HIDDEN), path)
    with _engine(folder, {"head": {"path": str(path)}}) as llm:
        (report,) = llm.collective_rpc("steer_sites")
    if report is None:
        return None
    return {site: {**one, "refused": _grouped(one["refused"])} for site, one in report.items()}


def _grouped(refused: Mapping[str, str]) -> dict[str, list[int]]:
    """By reason the layers, in place of by layer the reason."""
    layers: dict[str, list[int]] = {}
    for layer, reason in refused.items():
        layers.setdefault(reason, []).append(int(layer))
    return layers


@dataclass
class _Reference:
    """Hugging Face's model, and its log-probabilities before vLLM has started: unsteered, and by
    site with vectors in all layers, None where its modules are not found or it takes no text.
    """

    model: Any
    prompt: list[int]
    vectors: dict[str, torch.Tensor]
    plain: torch.Tensor | None = None
    steered: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> "_Reference":
        generator = torch.Generator().manual_seed(3)
        prompt = torch.randint(10, VOCAB, (_PROMPT_TOKENS,), generator=generator).tolist()
        vectors = {site: torch.randn(LAYERS, HIDDEN, generator=generator) / 2 for site in SITES}
        reference = cls(model, prompt, vectors)
        with suppress(Exception):
            reference.plain = _of_hugging_face(model, prompt, {})
            for site in SITES:
                if (steered := reference.at(site, range(LAYERS))) is not None:
                    reference.steered[site] = steered
        return reference

    def at(self, site: str, layers: Sequence[int]) -> torch.Tensor | None:
        """With the site's vectors in these layers."""
        if len(layers) == LAYERS and site in self.steered:
            return self.steered[site]
        places = _places(self.model, site, layers)
        if places is None:
            return None
        added = {module: self.vectors[site][number] for number, module in places.items()}
        return _of_hugging_face(self.model, self.prompt, added)


def _compare(reference: _Reference, folder: Path, sites: Sequence[str]) -> dict[str, float]:
    """By site the largest difference of a prompt token's log-probability from Hugging Face."""
    from vllm import SamplingParams

    from vllm_steer import VectorSteer, save_steer

    if reference.plain is None:
        raise ValueError("Hugging Face's model takes no text alone")
    steers = {}
    for site in sites:
        path = folder / f"{site}.safetensors"
        vectors = reference.vectors[site]
        save_steer(VectorSteer(vectors=vectors, layers=tuple(range(LAYERS)), site=site), path)
        steers[site] = {"path": str(path), "layers": "all"}
    names = ["", *sites]
    params = [
        SamplingParams(
            max_tokens=1,
            temperature=0,
            prompt_logprobs=1,
            detokenize=False,
            extra_args={"steer": {name: 1.0}} if name else None,
        )
        for name in names
    ]
    prompt, plain = reference.prompt, reference.plain
    with _engine(folder / "model", steers) as llm:
        (report,) = llm.collective_rpc("steer_sites")
        prompts = [{"prompt_token_ids": prompt}] * len(names)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    engine = {name: _of_engine(output, prompt) for name, output in zip(names, outputs, strict=True)}
    differences = {"unsteered": float((engine[""] - plain).abs().max())}
    if differences["unsteered"] > _UNSTEERED:
        return differences
    for site in sites:
        steered = reference.at(site, report[site]["layers"])
        if steered is not None:
            differences[site] = float((engine[site] - steered).abs().max())
            differences[f"{site} effect"] = float((plain - steered).abs().max())
    return differences


def _of_engine(output: Any, prompt: Sequence[int]) -> torch.Tensor:
    pairs = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
    return torch.tensor([step[token].logprob for token, step in pairs], dtype=torch.float64)


def _of_hugging_face(
    model: Any, prompt: Sequence[int], added: Mapping[nn.Module, torch.Tensor]
) -> torch.Tensor:
    with ExitStack() as hooks, torch.no_grad():
        for module, vector in added.items():
            hooks.callback(module.register_forward_hook(_adding(vector)).remove)
        logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    log_probs = logits.double().log_softmax(-1)
    return log_probs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


def _adding(vector: torch.Tensor) -> Any:
    def hook(_module: Any, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + vector, *output[1:])
        return output + vector

    return hook


def _places(model: Any, site: str, layers: Sequence[int]) -> dict[int, nn.Module] | None:
    """The modules of Hugging Face's model for a site, by layer; None if one is not found."""
    language = getattr(model, "language_model", None) or getattr(model, "model", model)
    language = getattr(language, "language_model", language)
    lists = [m for m in language.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS]
    if not lists:
        return None
    blocks = {number: lists[0][number] for number in layers}
    found = {number: _inside(block, site) for number, block in blocks.items()}
    if any(module is None for module in found.values()):
        return None
    return {number: module for number, module in found.items() if module is not None}


def _inside(block: nn.Module, site: str) -> nn.Module | None:
    if site == "resid":
        return block
    children = dict(block.named_children())
    if site == "attn_in":
        return next((children[name] for name in _NORMS if name in children), None)
    named = [child for child in children.values() if _ATTENTION.search(type(child).__name__)]
    return named[0] if len(named) == 1 else None
