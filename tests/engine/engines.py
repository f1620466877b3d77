"""Real vLLM engines in this process, and the steers and requests of the tests."""

import gc
import importlib.metadata
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from tiny_models import GUIDED_LAYERS, HIDDEN, VOCAB, heads_width

import vllm_steer
from vllm_steer import DeltaSteer, LMSteer, Steer, VectorSteer, save_steer
from vllm_steer.doses import Dose, Dynamic, Gate, TokenWindows
from vllm_steer.steers import ConditionSteer, LowRankSteer, SAESteer

Setting = Mapping[str, float | Mapping[str, Any]]

RUNNER = os.environ.get("VLLM_STEER_TEST_RUNNER", "v1")
vllm_version = Version(importlib.metadata.version("vllm"))

# Features that this vLLM lacks even without the plugin.
ties_gemma = vllm_version < Version("0.29")
unties_gemma = pytest.mark.skipif(
    ties_gemma,
    reason=f"vLLM {vllm_version.base_version} asserts that a Gemma's head is tied",
)
samples = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" and vllm_version < Version("0.31"),
    reason=f"vLLM {vllm_version.base_version} cannot sample at a temperature here: its kernel "
    "gumbel_sample fails in Triton's interpreter",
)

# At least 8 requests with at least 6 settings: every variant, mixes, zero and none.
MIXED: tuple[dict[str, float], ...] = (
    {},
    {"plain": 3.0},
    {"plain": -3.0},
    {"dummy": 2.0},
    {"wide": 1.5},
    {"bias": 4.0},
    {"tilt": -3.0},
    {"plain": 1.0, "dummy": -2.0, "bias": 2.0, "tilt": 1.0},
    {"plain": 0.0},
    {"wide": -1.0, "dummy": 1.0},
)

# Every kind, site, mode, phase and schedule; several at one site and across sites; with LM steers.
GUIDED: tuple[Setting, ...] = (
    {},
    {"push": 1.0},
    {"push": -1.5},
    {"nudge": 2.0},
    {"lean": -1.5},
    {"turn": 6.0},
    {"spin": -5.0},
    {"bend": 5.0},
    {"steps": 3.0},
    {"walk": -3.0},
    {"push": {"strength": 2.0, "phase": "generation"}},
    {"turn": {"strength": -8.0, "phase": "prompt"}},
    {"push": {"strength": 1.2, "phase": "text"}},
    {"steps": {"strength": 5.0, "schedule": "start"}},
    {"steps": {"strength": -4.0, "schedule": "dim", "phase": "generation"}},
    {"walk": {"strength": 4.0, "schedule": "fixed", "phase": "prompt"}},
    {"push": {"strength": 1.5, "layers": "0-1"}, "spin": {"strength": 4.0, "layers": "1"}},
    {"turn": 5.0, "lean": 1.0},
    {"turn": 4.0, "twist": -6.0},
    {"turn": {"strength": 5.0, "phase": "prompt"}, "lean": {"strength": 1.5, "phase": "all"}},
    {"nudge": {"strength": 1.5, "layers": [0]}, "bend": {"strength": -4.0, "phase": "generation"}},
    {"push": -0.7, "spin": 4.0, "walk": 2.0},
    {"spin": 3.0, "bend": 3.0, "turn": 3.0, "steps": 1.5},
    {"push": 0.0, "turn": {"strength": 0.0}},
    {"push": 1.0, "spin": 0.0},
    {"plain": 2.0, "bias": -2.0, "push": 0.7, "steps": -2.0},
    {"tilt": -2.0, "twist": {"strength": 6.0, "layers": "0"}, "walk": {"strength": 2.0}},
)


def random_steers(hidden_size: int, vocab_size: int) -> dict[str, LMSteer]:
    """One steer of each variant, with mixed ranks, strong enough to change the text."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def multiply(columns: int, rank: int, fixed: tuple[int, ...] = ()) -> LMSteer:
        return LMSteer(
            variant="multiply",
            projector1=normal(columns, hidden_size, rank),
            projector2=normal(columns, hidden_size, rank),
            epsilon=0.1 / hidden_size,
            hidden_size=hidden_size,
            fixed_columns=fixed,
        )

    return {
        "plain": multiply(1, 8),
        "dummy": multiply(2, 5, fixed=(1,)),
        "wide": multiply(1, hidden_size // 2 + 9),
        "bias": LMSteer(
            variant="add", add=normal(1, hidden_size), epsilon=0.05, hidden_size=hidden_size
        ),
        "tilt": LMSteer(
            variant="offset",
            offset=normal(2, vocab_size),
            epsilon=0.3,
            hidden_size=hidden_size,
            fixed_columns=(0,),
        ),
    }


def guidance_steers(
    hidden_size: int, num_layers: int, heads_width: int, seed: int = 5
) -> dict[str, Steer]:
    """Steers inside the layers: every kind, site and mode, in all layers or in some."""
    generator = torch.Generator().manual_seed(seed)
    every = tuple(range(num_layers))
    first, second, outer = every[:-1], every[1:], every[::2]

    def vector(layers: tuple[int, ...], site: Any, mode: Any) -> VectorSteer:
        vectors = torch.randn(len(layers), hidden_size, generator=generator) / 2
        return VectorSteer(vectors=vectors, layers=layers, site=site, mode=mode)

    def delta(steps: int, layers: tuple[int, ...], width: int, **fields: Any) -> DeltaSteer:
        values = torch.randn(steps, len(layers), width, generator=generator) / 2
        return DeltaSteer(delta=values, layers=layers, **fields)

    return {
        "push": vector(every, "resid", "add"),
        "nudge": vector(outer, "attn_out", "add"),
        "turn": vector(every, "attn_in", "rotate"),
        "spin": vector(second, "resid", "rotate"),
        "lean": vector(every, "attn_in", "add"),
        "bend": vector(every, "attn_out", "rotate"),
        "twist": vector(first, "attn_in", "rotate"),
        "steps": delta(5, every, heads_width, site="heads", schedule="fixed"),
        "walk": delta(4, second, hidden_size, site="resid", schedule="dim"),
    }


def reading_steers(hidden_size: int, num_layers: int, seed: int = 8) -> dict[str, Steer]:
    """Steers that read the token, at every site that vectors have."""
    generator = torch.Generator().manual_seed(seed)
    every = tuple(range(num_layers))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def vector(site: Any, mode: Any, layers: tuple[int, ...] = every, **bounds: float) -> Steer:
        vectors = normal(len(layers), hidden_size)
        return VectorSteer(vectors=vectors, layers=layers, site=site, mode=mode, **bounds)

    def low_rank(site: Any, rank: int, layers: tuple[int, ...], *, biased: bool) -> Steer:
        shape = (len(layers), rank, hidden_size)
        return LowRankSteer(
            a=normal(*shape) / hidden_size**0.5,
            b=normal(len(layers), hidden_size, rank) / rank**0.5,
            bias=normal(len(layers), rank) if biased else None,
            layers=layers,
            site=site,
        )

    def sae(mode: Any, site: Any, threshold: float, **bounds: float) -> Steer:
        return SAESteer(
            encoder=normal(num_layers, hidden_size) / hidden_size**0.5,
            decoder=normal(num_layers, hidden_size),
            bias=normal(num_layers) / 4,
            threshold=torch.full((num_layers,), threshold),
            layers=every,
            site=site,
            mode=mode,
            **bounds,
        )

    return {
        "ablate": vector("resid", "project"),
        "floor": vector("resid", "project", low=0.5, high=float("inf")),
        "band": vector("attn_out", "project", every[::2], low=-0.2, high=0.3),
        "relate": vector("resid", "relative"),
        "scaled": vector("attn_in", "relative"),
        "loreft": low_rank("resid", 4, every, biased=True),
        "linear": low_rank("attn_out", 3, every[1:], biased=False),
        "pin": sae("clamp", "resid", 0.0, low=2.0, high=2.0),
        "jump": sae("clamp", "resid", 0.3),
        "boost": sae("scale", "attn_in", 0.0),
        "feature": sae("add", "resid", 0.0),
    }


def conditions(hidden_size: int, num_layers: int, seed: int = 9) -> dict[str, Steer]:
    """Conditions of every similarity, side and choice of tokens, about half of which hold."""
    generator = torch.Generator().manual_seed(seed)

    def condition(layer: int, site: Any = "resid", **fields: Any) -> Steer:
        vector = torch.randn(1, hidden_size, generator=generator)
        return ConditionSteer(vector=vector, layers=(layer,), site=site, **fields)

    last = num_layers - 1
    return {
        "early": condition(0, threshold=0.0),
        "late": condition(last, threshold=0.01, side="below"),
        "dotted": condition(0, "attn_in", threshold=0.4, similarity="dot"),
        "cast": condition(1, threshold=0.1, similarity="cast"),
        "anywhere": condition(1, threshold=0.2, tokens="any"),
        "lowest": condition(0, "attn_out", threshold=-0.25, side="below", tokens="any"),
    }


# Phases by windows; what reads the token, alone, together and with older kinds; gates.
READING: tuple[Setting, ...] = (
    {},
    {"push": {"strength": 1.5, "phase": "answer"}},
    {"push": {"strength": -2.0, "phase": "last"}},
    {"turn": {"strength": 8.0, "phase": {"answer": "0:4"}}},
    {"push": {"strength": 1.5, "phase": {"prompt": ["-4:", ":2"], "answer": ["1:3", "5:"]}}},
    {"steps": {"strength": 4.0, "phase": {"answer": "1:3"}}},
    {"ablate": 1.0},
    {"ablate": {"strength": 0.7, "phase": "answer"}, "floor": 1.0},
    {"floor": {"strength": 1.0, "low": -3.0, "high": -2.0}, "band": 1.0},
    {"relate": 0.3},
    {"scaled": -0.4, "turn": 5.0},
    {"relate": -0.2, "spin": 4.0, "ablate": 1.0},
    {"pin": 1.0},
    {"jump": {"strength": 1.5, "low": 1.0, "high": "inf"}},
    {"boost": 2.0, "feature": -1.0},
    {"loreft": 1.0},
    {"loreft": {"strength": -0.7, "phase": {"prompt": [":3", "-3:"]}}, "linear": 2.0},
    {"linear": {"strength": 3.0, "when": "early"}, "loreft": {"strength": 0.5, "layers": "0,2"}},
    {"loreft": 0.5, "push": 1.0, "ablate": 1.0, "plain": 2.0},
    {"push": {"strength": 1.5, "when": "early"}},
    {"push": {"strength": -1.5, "when": "late", "phase": "generation"}},
    {"relate": {"strength": 0.4, "when": "dotted"}, "plain": {"strength": 3.0, "when": "cast"}},
    {"ablate": {"strength": 3.0, "when": {"any": ["early", "dotted", "lowest"]}}},
    {"push": {"strength": 2.0, "when": {"all": ["early", "cast"]}, "layers": "1-2"}},
    {"spin": {"strength": 6.0, "when": "anywhere"}, "bias": {"strength": 4.0, "when": "late"}},
    {"walk": {"strength": 3.0, "when": "cast"}, "push": 0.5},
    {"push": {"strength": 1.0, "when": "lowest", "phase": {"answer": ["0:2", "4:6"]}}},
    {"plain": {"strength": -3.0, "when": {"all": ["early", "anywhere"]}}, "tilt": -1.0},
)


def guided_family(family: str) -> tuple[tuple[Setting, ...], dict[str, Steer]]:
    """The settings and the steers of a guided family, without those that it has no site for."""
    width = heads_width(family)
    guidance = guidance_steers(HIDDEN, GUIDED_LAYERS, width)
    steers: dict[str, Steer] = {**random_steers(HIDDEN, VOCAB), **guidance}
    if family != "olmo2-no-input-norm":
        return GUIDED, steers
    servable = {name: steer for name, steer in steers.items() if steer.site != "attn_in"}
    return settings_without("attn_in", GUIDED, steers), servable


def doses_of(setting: Setting, steers: Mapping[str, Steer]) -> list[Dose]:
    """A setting as doses, read without the project's parser; zero strengths are kept."""
    doses = []
    for name, request_value in setting.items():
        options = (
            dict(request_value)
            if isinstance(request_value, Mapping)
            else {"strength": request_value}
        )
        if "layers" in options:
            options["layers"] = _layers(options["layers"])
        if isinstance(options.get("phase"), Mapping):
            options["phase"] = _windows(options["phase"])
        options |= {key: float(options[key]) for key in ("low", "high") if key in options}
        if "when" in options:
            options["gate"] = _gate(options.pop("when"))
            options.setdefault("phase", "answer")
        if options["strength"] == "dynamic":
            options["strength"] = options.pop("max", 2.0)
            kinds = {key: options.pop(key) for key in ("top_p", "kl") if key in options}
            options["dynamic"] = Dynamic(**kinds)
        elif isinstance(steer := steers[name], DeltaSteer):
            options.setdefault("schedule", steer.schedule)
        doses.append(Dose(steer=name, **options))
    return doses


def _windows(parts: Mapping[str, Any]) -> TokenWindows:
    """Windows such as ``{"prompt": ["-4:", ":2"], "answer": "0:8"}``."""
    slices = {
        part: tuple(
            tuple(int(bound) if bound else None for bound in window.split(":"))
            for window in ([value] if isinstance(value, str) else value)
        )
        for part, value in parts.items()
    }
    return TokenWindows(**slices)  # type: ignore[arg-type]


def _gate(value: Any) -> Gate:
    if isinstance(value, str):
        return Gate((value,))
    ((needs, names),) = value.items()
    return Gate(tuple(names), needs)


def dynamic(maximum: float = 2.0, **options: Any) -> dict[str, Any]:
    """Options of a steer with dynamic strength."""
    return {"strength": "dynamic", "max": maximum, **options}


def _layers(layers: str | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(layers, str):
        return tuple(layers)
    spans = [part.split("-") for part in layers.split(",")]
    return tuple(layer for span in spans for layer in range(int(span[0]), int(span[-1]) + 1))


def settings_without(
    site: str, settings: Sequence[Setting], steers: Mapping[str, Steer]
) -> tuple[Setting, ...]:
    """The settings that need no steer at a site, for a model that does not have it."""
    return tuple(s for s in settings if all(steers[name].site != site for name in s))


def steer_config(steers: Mapping[str, Steer], folder: Path) -> dict[str, Any]:
    """Save steers and name them in a config dict."""
    folder.mkdir(exist_ok=True)
    for name, steer in steers.items():
        save_steer(steer, folder / f"{name}.safetensors")
    return {"steers": {name: {"path": str(folder / f"{name}.safetensors")} for name in steers}}


def load_into(llm: Any, folder: Path, steers: Mapping[str, Steer], **options: Any) -> None:
    """Save steers and load them into a running engine."""
    folder.mkdir(exist_ok=True)
    for name, steer in steers.items():
        save_steer(steer, folder / f"{name}.safetensors")
        vllm_steer.load_steer_into(llm, name, folder / f"{name}.safetensors", **options)


@contextmanager
def engine(model: Path | str, steer: Any = None, **options: Any) -> Iterator[Any]:
    """An ``LLM`` on the runner under test; shut down afterwards."""
    with hugging_face_classes_restored():
        yield from _engine(model, steer, **options)


@contextmanager
def hugging_face_classes_restored() -> Iterator[None]:
    """vLLM's Transformers backend changes a model's class so that only vLLM can make the next one:
    give it back what it was, for the tests that come later in this process.
    """
    from vllm.compilation import decorators

    change, made = decorators._support_torch_compile, {}

    def noted(cls: type, *args: Any, **kwargs: Any) -> type:
        if cls.__module__.startswith("transformers."):
            made.setdefault(cls, (cls.__bases__, dict(vars(cls))))
        return change(cls, *args, **kwargs)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decorators, "_support_torch_compile", noted)
            yield
    finally:
        for cls, (bases, attributes) in made.items():
            cls.__bases__ = bases
            for name in vars(cls).keys() - attributes.keys():
                delattr(cls, name)
            for name, value in attributes.items():
                if vars(cls)[name] is not value:
                    setattr(cls, name, value)


def _engine(model: Path | str, steer: Any, **options: Any) -> Iterator[Any]:
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 256,
        "seed": 0,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
    }
    if steer is not None:
        settings["additional_config"] = {"steer": steer}
    llm = LLM(str(model), **{**settings, **options})
    assert llm.llm_engine.vllm_config.use_v2_model_runner == (RUNNER == "v2")
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def prompts(count: int, *, length: int = 12, vocab_size: int = 500) -> list[dict[str, Any]]:
    """Different random prompts of mixed lengths, as token ids."""
    generator = torch.Generator().manual_seed(11)
    lengths = [max(2, length - 3 * (index % 4)) for index in range(count)]
    return [
        {"prompt_token_ids": torch.randint(3, vocab_size, (n,), generator=generator).tolist()}
        for n in lengths
    ]


def greedy(settings: Sequence[Setting], *, max_tokens: int = 12, **options: Any) -> list[Any]:
    """Greedy sampling parameters, one per setting; an empty setting has no steer."""
    from vllm import SamplingParams

    defaults = {"temperature": 0, "ignore_eos": True, "logprobs": 1, "detokenize": False}
    return [
        SamplingParams(
            max_tokens=max_tokens,
            extra_args={"steer": dict(setting)} if setting else None,
            **{**defaults, **options},
        )
        for setting in settings
    ]


def is_dynamic(setting: Setting) -> bool:
    """True if a setting requests a dynamic strength."""
    return any(isinstance(o, Mapping) and o["strength"] == "dynamic" for o in setting.values())


def reporting(params: Sequence[Any]) -> list[Any]:
    """Sampling parameters that request the strengths of their dynamic steers."""
    for parameters in params:
        if parameters.extra_args and is_dynamic(parameters.extra_args["steer"]):
            parameters.extra_args["steer_strengths"] = True
    return list(params)
