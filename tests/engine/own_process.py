"""Scenarios that need a separate Python process: ``python own_process.py SCENARIO``.

N-gram speculation imports numba, after which vLLM's CPU platform starts no second engine in this
process; parallel engines start workers that import the main module again; vLLM's Transformers
backend changes the classes of the model it serves; only another process reads a compile cache
again; an engine without the plugin must never have loaded it.
"""

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest  # noqa: F401 (sets the environment, in worker processes too)
import dynamic_settings
import loading_scenarios
import reading_scenarios
import torch
import wrapped_scenarios
from dynamic_outputs import assert_dynamic
from engines import (
    GUIDED,
    MIXED,
    RUNNER,
    Setting,
    doses_of,
    engine,
    greedy,
    guidance_steers,
    guided_family,
    prompts,
    random_steers,
    reporting,
    settings_without,
    steer_config,
)
from reference import assert_guided, load_reference
from self_tested_models import UNTESTED, save_untested
from tiny_models import GUIDED_LAYERS, HIDDEN, VOCAB, save_tiny_model

from vllm_steer import VectorSteer

TOKENS = 8
SETTINGS: tuple[Setting, ...] = (*MIXED, *GUIDED)
STEERS = {
    **random_steers(HIDDEN, VOCAB),
    **guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN),
}


def ngram_speculation(folder: Path) -> None:
    """Several logits rows per request, of which some are drafts that are accepted."""
    model = save_tiny_model("llama", folder / "model", num_layers=GUIDED_LAYERS)
    repeated = [{"prompt_token_ids": p["prompt_token_ids"][:4] * 5} for p in prompts(len(SETTINGS))]
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    config = steer_config(STEERS, folder / "steers")
    reference = load_reference(model)
    with engine(model, config, speculative_config=speculative) as llm:
        outputs = llm.generate(repeated, greedy(SETTINGS, max_tokens=100), use_tqdm=False)
        metrics = {metric.name: metric for metric in llm.get_metrics()}
    assert metrics["vllm:spec_decode_num_draft_tokens"].value > 0
    accepted = metrics["vllm:spec_decode_num_accepted_tokens"].value
    assert accepted > 0
    check(outputs, reference)
    print(f"accepted drafts: {accepted}")


def mixed_batch(folder: Path, **options: Any) -> None:
    """A batch of every setting, prompt logprobs included."""
    model = save_tiny_model("llama", folder / "model", num_layers=GUIDED_LAYERS)
    reference = load_reference(model)  # before the Transformers backend changes its class
    with engine(model, steer_config(STEERS, folder / "steers"), **options) as llm:
        params = greedy(SETTINGS, prompt_logprobs=1)
        outputs = llm.generate(prompts(len(SETTINGS)), params, use_tqdm=False)
    check(outputs, reference)


def poisoned_memory(folder: Path) -> None:
    """The batch where new memory holds NaN, as it may on any machine: nothing unwritten is read.

    The self-test and the check of the steers run the model before there is a KV cache, when vLLM's
    attention leaves its output unwritten: their hidden states must be finite all the same.
    """
    assert "vllm" not in sys.modules
    poisoned = poison_new_memory()
    counts = record_start_up_runs()
    mixed_batch(folder)
    assert poisoned["empty"] and poisoned["empty_like"], poisoned
    assert counts["values"] and not counts["nan"], counts
    print(f"NaN in new memory {sum(poisoned.values())} times; in {counts['runs']} dummy runs: 0")


def poison_new_memory() -> Counter[str]:
    """Fill each new float tensor on the CPU with NaN; the count by the function that made it.

    Not where torch.compile traces, as it may vLLM's sampler: compiled code makes its own memory.
    """
    poisoned: Counter[str] = Counter()

    def poison(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def new(*args: Any, **kwargs: Any) -> Any:
            tensor = original(*args, **kwargs)
            if torch.compiler.is_compiling() or type(tensor) is not torch.Tensor:
                return tensor
            if tensor.device.type == "cpu" and tensor.is_floating_point() and tensor.numel():
                tensor.fill_(float("nan"))
                poisoned[name] += 1
            return tensor

        setattr(owner, name, new)

    for name in ("empty", "empty_like", "empty_strided"):
        poison(torch, name)
    poison(torch.Tensor, "new_empty")
    return poisoned


def record_start_up_runs() -> Counter[str]:
    """Count NaN in the hidden states of the dummy runs of the self-test and of the check."""
    if RUNNER == "v2":
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm_steer.serving import worker

    counts: Counter[str] = Counter()
    own_run, dummy_run = worker._WorkerSteering._dummy_run, GPUModelRunner._dummy_run
    is_own = False

    def start_up_run(self: Any, num_tokens: int) -> None:
        nonlocal is_own
        is_own = True
        try:
            own_run(self, num_tokens)
        finally:
            is_own = False
        counts["runs"] += 1

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = dummy_run(self, *args, **kwargs)
        if is_own:
            counts["values"] += outputs[0].numel()
            counts["nan"] += int(torch.isnan(outputs[0]).sum())
        return outputs

    worker._WorkerSteering._dummy_run = start_up_run
    GPUModelRunner._dummy_run = recorded
    return counts


def parallel(folder: Path, **options: Any) -> None:
    """The batch on two worker processes."""
    mixed_batch(folder, distributed_executor_backend="mp", enforce_eager=False, **options)


def transformers_backend(folder: Path) -> None:
    """vLLM's Transformers backend on a model that vLLM also implements natively."""
    mixed_batch(folder, model_impl="transformers")


def compile_in_pieces() -> None:
    """Piecewise compilation with ahead-of-time artifacts, which vLLM's CPU platform leaves off."""
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    platform = type(current_platform)
    check_and_update = platform.check_and_update_config.__func__

    def in_pieces(cls: Any, vllm_config: Any) -> None:
        check_and_update(cls, vllm_config)
        vllm_config.compilation_config.mode = CompilationMode.VLLM_COMPILE
        vllm_config.compilation_config.splitting_ops = None
        vllm_config.compilation_config.compile_sizes = []

    platform.check_and_update_config = classmethod(in_pieces)
    FixFunctionalizationPass.__call__ = lambda self, graph: None  # names CUDA's ops


def compiled_in_pieces(folder: Path) -> None:
    """A batch on a compiled engine, or with ``unsteered`` an engine without steers.

    ``VLLM_STEER_TEST_FOLDER`` is kept from one process to the next, so that the second meets the
    steers and the compile cache of the first.
    """
    compile_in_pieces()
    kept_folder = Path(os.environ["VLLM_STEER_TEST_FOLDER"])
    if "unsteered" in sys.argv:
        model = save_tiny_model("llama", kept_folder / "model", num_layers=GUIDED_LAYERS)
        with engine(model, enforce_eager=False) as llm:
            llm.generate(prompts(2), greedy([{}] * 2), use_tqdm=False)
    else:
        mixed_batch(kept_folder, enforce_eager=False)


def pieces_compiled(folder: Path) -> None:
    """The number of distinct pieces that an engine compiles, without a steer and with a vector in
    every layer.

    vLLM keeps an artifact for each piece that differs from those before it.
    """
    from vllm.compilation.counter import compilation_counter

    compile_in_pieces()
    layers = 8
    model = save_tiny_model("llama", folder / "model", num_layers=layers)
    everywhere = tuple(range(layers))
    push = VectorSteer(vectors=torch.ones(layers, HIDDEN), layers=everywhere, site="resid")
    config = steer_config({"push": push}, folder / "steers")
    saved = []
    for steer in (None, config):
        before = compilation_counter.num_compiled_artifacts_saved
        with engine(model, steer, enforce_eager=False) as llm:
            request_value = {"push": 1.0} if steer else {}
            llm.generate(prompts(1), greedy([request_value]), use_tqdm=False)
        saved.append(compilation_counter.num_compiled_artifacts_saved - before)
    print(json.dumps({"layers": layers, "stock": saved[0], "hooked": saved[1]}))


def compiled_families(folder: Path) -> None:
    """Each family named on the command line twice: compiled and saved, then loaded again."""
    compile_in_pieces()
    for family in sys.argv[2:]:
        subfolder = folder / family
        model = save_tiny_model(family, subfolder / "model", num_layers=GUIDED_LAYERS)
        settings, steers = guided_family(family)
        reference, config = load_reference(model), steer_config(steers, subfolder / "steers")
        for state in ("compiled", "loaded"):
            with engine(model, config, enforce_eager=False) as llm:
                params = greedy(settings, prompt_logprobs=1)
                outputs = llm.generate(prompts(len(settings)), params, use_tqdm=False)
            for output, setting in zip(outputs, settings, strict=True):
                assert_guided(output, reference, doses_of(setting, steers), steers)
            print(f"{family} {state}: {len(outputs)} outputs equal the reference")


def tensor_parallel(folder: Path) -> None:
    """Two tensor-parallel ranks: the vocabulary is sharded, the hidden state is not."""
    parallel(folder, tensor_parallel_size=2)


def parallel_blocks(folder: Path) -> None:
    """Two ranks, blocks with attention and MLP side by side: ranks may have parts of a sum there.

    Such a site is refused; the others, heads included, equal the reference.
    """
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    for name, partial in (("CohereForCausalLM", {"attn_out"}), ("GPTJForCausalLM", set())):
        model = save_untested(UNTESTED[name], folder / name)
        reference = load_reference(model)
        steers = {key: steer for key, steer in STEERS.items() if steer.site not in partial}
        settings = settings_without("attn_out", GUIDED, STEERS) if partial else GUIDED
        with engine(model, steer_config(steers, folder / f"{name}-steers"), **options) as llm:
            reports = llm.collective_rpc("steer_sites")
            outputs = llm.generate(prompts(len(settings)), greedy(settings), use_tqdm=False)
        for output, setting in zip(outputs, settings, strict=True):
            assert_guided(output, reference, doses_of(setting, STEERS), STEERS)
        assert reports[0] == reports[1]
        refused = {site: one["refused"] for site, one in reports[0].items() if one["refused"]}
        assert refused.keys() == partial
        for reasons in refused.values():
            assert all("a partial sum" in reason for reason in reasons.values())
        print(f"{name}: {len(outputs)} outputs equal")


def dynamic_tensor_parallel(folder: Path) -> None:
    """Strengths that follow from the text, computed by two tensor-parallel ranks."""
    settings = dynamic_settings.SETTINGS
    model = save_tiny_model("llama", folder / "model", num_layers=GUIDED_LAYERS)
    reference = load_reference(model)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    config = steer_config(STEERS, folder / "steers")
    with engine(model, config, async_scheduling=False, max_num_seqs=128, **options) as llm:
        params = reporting(greedy(settings))
        outputs = llm.generate(prompts(len(settings)), params, use_tqdm=False)
    for output, setting in zip(outputs, settings, strict=True):
        assert_dynamic(output, reference, doses_of(setting, STEERS), STEERS)
    print(f"{len(outputs)} outputs equal the reference")


def pipeline_parallel(folder: Path) -> None:
    """Two pipeline stages: each has its own layers, only the last one has a head."""
    parallel(folder, pipeline_parallel_size=2)


def stock_logprobs(folder: Path) -> None:
    """Print the exact output of an engine in a process that never loaded the plugin."""
    assert os.environ["VLLM_PLUGINS"] == ""
    model = save_tiny_model("llama", folder / "model", num_layers=GUIDED_LAYERS)
    with engine(model) as llm:
        outputs = llm.generate(
            prompts(len(SETTINGS)),
            greedy([{}] * len(SETTINGS), max_tokens=TOKENS, prompt_logprobs=1),
            use_tqdm=False,
        )
    assert not any(name.startswith("vllm_steer.serving") for name in sys.modules)
    print(json.dumps([exact(output) for output in outputs]))


def exact(output: Any) -> dict[str, Any]:
    """Tokens and all logprobs of an output, floats as hexadecimal text."""
    steps = [step for step in [*output.prompt_logprobs, *output.outputs[0].logprobs] if step]
    return {
        "tokens": list(output.outputs[0].token_ids),
        "logprobs": [
            sorted((token, entry.logprob.hex()) for token, entry in step.items()) for step in steps
        ],
    }


def check(outputs: list[Any], reference: Any) -> None:
    """Compare a batch of ``SETTINGS`` with the reference."""
    for output, setting in zip(outputs, SETTINGS, strict=True):
        assert_guided(output, reference, doses_of(setting, STEERS), STEERS)
    print(f"{len(outputs)} outputs equal the reference")


SCENARIOS: dict[str, Callable[[Path], None]] = {
    "ngram-speculation": ngram_speculation,
    "tensor-parallel": tensor_parallel,
    "parallel-blocks": parallel_blocks,
    "dynamic-tensor-parallel": dynamic_tensor_parallel,
    "pipeline-parallel": pipeline_parallel,
    "poisoned-memory": poisoned_memory,
    "transformers-backend": transformers_backend,
    "compiled-in-pieces": compiled_in_pieces,
    "compiled-families": compiled_families,
    "pieces-compiled": pieces_compiled,
    "stock-logprobs": stock_logprobs,
    "wrapped-models": wrapped_scenarios.wrapped_models,
    "loaded-on-tensor-ranks": loading_scenarios.loaded_on_tensor_ranks,
    "loaded-on-pipeline-stages": loading_scenarios.loaded_on_pipeline_stages,
    "image-prompts": wrapped_scenarios.image_prompts,
    "readings-on-tensor-ranks": reading_scenarios.readings_on_tensor_ranks,
    "readings-on-pipeline-stages": reading_scenarios.readings_on_pipeline_stages,
    "loaded-readings-on-tensor-ranks": reading_scenarios.loaded_readings_on_tensor_ranks,
    "readings-with-drafts": reading_scenarios.readings_with_drafts,
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        SCENARIOS[sys.argv[1]](Path(temporary))
