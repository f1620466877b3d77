"""A real engine on this machine against references from another: see ``references.py``.

    python -m benchmarks.card.engine_check DATA --json OUT [--runner v1|v2] [--eager]

Runs an engine without steers, then one with all steers, in one process. Every request of the whole
batch, and of smaller batches that need padding, must match the references; requests without a steer
must equal the engine without steers, number for number. ``DATA`` says which steers and requests.
"""

import argparse
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks import arguments
from benchmarks.engines import greedy, make_engine, set_environment

SURE = 1e-3
"""Two tokens that lie closer, or two sets of likeliest ones, may change places in float32."""
TOLERANCE = 1e-4
CAPTURED = [1, 2, 4, 8, 16, 32, 64]
Request = dict[str, Any]


def main() -> int:
    """Run every check and write its result; returns 0 if all hold."""
    args = _arguments()
    _prepare(args)
    result: dict[str, Any] = {"runner": args.runner, "eager": args.eager, "checks": []}
    try:
        _check_all(args, result)
    except Exception:
        result["error"] = traceback.format_exc()[-4000:]
    checks = result["checks"]
    failed = [check["name"] for check in checks if not check["ok"]]
    result["ok"] = bool(checks) and not failed and "error" not in result
    result["summary"] = (
        f"{len(checks) - len(failed)} of {len(checks)} checks hold"
        + (f"; failed: {', '.join(failed)}" if failed else "")
        + (f"; {result['error'].splitlines()[-1][:300]}" if "error" in result else "")
    )
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(result["summary"], flush=True)
    return 0 if result["ok"] else 1


def _prepare(args: argparse.Namespace) -> None:
    """Set the environment, before vLLM is imported."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if args.runner == "v2" else "0"
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # vLLM's attention would use TF32
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    set_environment()
    if args.runner == "v2" and not torch.cuda.is_available():
        # vLLM's own Triton kernels, in Triton's interpreter.
        os.environ["TRITON_INTERPRET"] = "1"
        import triton.backends

        driver = SimpleNamespace(is_active=lambda: True)
        triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


@contextmanager
def _engine(args: argparse.Namespace, steer: Any, num_requests: int) -> Iterator[Any]:
    """An engine with or without steers; closed at the end of the block."""
    options: dict[str, Any] = {"max_num_seqs": max(64, 3 * num_requests)}
    options |= json.loads((args.data / "engine.json").read_text())
    if torch.cuda.is_available():
        # A fixed cache size: a memory profile would count the memory of other processes.
        options |= {"kv_cache_memory_bytes": 1 << 28, "attention_backend": "TRITON_ATTN"}
        if not args.eager:
            options["compilation_config"] = {"cudagraph_capture_sizes": CAPTURED}
    llm = make_engine(
        args.data / "model",
        steer,
        plugin=steer is not None,
        gpu_memory=0.05,
        dtype="float32",
        seed=0,
        enforce_eager=args.eager,
        **options,
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


def _ask(
    llm: Any, requests: Sequence[Request], tokens: int, *, prompt_logprobs: int | None = None
) -> list[Any]:
    """Greedy texts of a batch; prompt logprobs of those that may have them."""
    params = [
        greedy(
            tokens,
            logprobs=1,
            extra_args=(
                {"steer": r["steer"], "steer_strengths": r["dynamic"]} if r["steer"] else None
            ),
            prompt_logprobs=None if r["gated"] else prompt_logprobs,
        )
        for r in requests
    ]
    prompts = [{"prompt_token_ids": r["prompt"]} for r in requests]
    return llm.generate(prompts, params, use_tqdm=False)


def _check_all(args: argparse.Namespace, result: dict[str, Any]) -> None:
    requests: list[Request] = json.loads((args.data / "requests.json").read_text())
    references = dict(np.load(args.data / "references.npz"))
    fixed = [i for i, request in enumerate(requests) if not request["dynamic"]]
    dynamic = [i for i, request in enumerate(requests) if request["dynamic"]]
    plain = [{**requests[i], "steer": {}, "gated": False} for i in fixed]
    tokens = len(references[f"tokens_{fixed[0]}"])
    paths = sorted((args.data / "steers").glob("*.safetensors"))
    steers = {"steers": {path.stem: {"path": str(path)} for path in paths}}
    run = _Checks(result["checks"])

    with _engine(args, None, len(requests)) as llm:
        unsteered = [_exact(output) for output in _ask(llm, plain, tokens)]
    del llm
    with _engine(args, steers, len(requests)) as llm:
        result["engine"] = _facts(llm)
        compiled = _compiled_from_now_on()

        def batch(size: int, **options: Any) -> str:
            """A batch of the last requests: these need padding, and have different neighbours each
            time.
            """
            some = fixed[-size:]
            outputs = _ask(llm, [requests[i] for i in some], tokens, **options)
            return _compare(some, outputs, references)

        def without_steers() -> str:
            numbers = [_exact(output) for output in _ask(llm, plain, tokens)]
            worst = max(map(_difference, numbers, unsteered))
            pairs = enumerate(zip(numbers, unsteered, strict=True))
            different = [i for i, (one, other) in pairs if one != other]
            assert not different, f"requests {different} differ, logprobs by {worst:.1e}"
            return f"{len(numbers)} requests, number for number"

        def dynamic_strengths() -> str:
            most = len(references[f"tokens_{dynamic[0]}"])
            outputs = _ask(llm, [requests[i] for i in dynamic], most)
            return _compare_dynamic(dynamic, outputs, requests, references)

        run("all together, prompt logprobs", lambda: batch(len(fixed), prompt_logprobs=1))
        run("batches of 13, 3 and 1", lambda: "; ".join(batch(size) for size in (13, 3, 1)))
        run("unsteered as without steers", without_steers)
        run("all together again", lambda: batch(len(fixed), prompt_logprobs=1))
        run("graphs were captured", lambda: _graphs(args, result))
        if dynamic:
            run("dynamic strengths", dynamic_strengths)
        run("nothing of ours compiled", lambda: _nothing_of_ours(compiled, result))


class _Checks:
    """Runs checks; a failed check does not stop the next."""

    def __init__(self, checks: list[dict[str, Any]]) -> None:
        self._checks = checks

    def __call__(self, name: str, check: Callable[[], str]) -> None:
        try:
            ok, report = True, check()
        except Exception:
            ok, report = False, traceback.format_exc()[-2000:]
        self._checks.append({"name": name, "ok": ok, "said": report})
        print(f"{name}: {'holds' if ok else 'FAILS'}: {report.splitlines()[-1][:200]}", flush=True)


def _compare(
    indices: Sequence[int], outputs: Sequence[Any], references: dict[str, np.ndarray]
) -> str:
    """Compare tokens and logprobs of a batch; returns the largest difference of a logprob."""
    worst = 0.0
    for index, output in zip(indices, outputs, strict=True):
        worst = max(worst, _compare_text(index, output, references, TOLERANCE))
        of_prompt = references[f"prompt_{index}"]
        for position, entry in enumerate(output.prompt_logprobs or []):
            if entry is not None:
                token = output.prompt_token_ids[position]
                error = abs(entry[token].logprob - of_prompt[position - 1])
                assert error <= TOLERANCE, f"request {index}, prompt token {position}: {error:.2e}"
                worst = max(worst, error)
    return f"{len(indices)} requests, largest difference of a logprob {worst:.1e}"


def _compare_text(
    index: int, output: Any, references: dict[str, np.ndarray], tolerance: float
) -> float:
    """Compare a text up to the first token that float32 may choose differently."""
    completion, worst = output.outputs[0], 0.0
    expected, logprobs = references[f"tokens_{index}"], references[f"logprobs_{index}"]
    for step, (token, margin) in enumerate(
        zip(expected, references[f"margins_{index}"], strict=True)
    ):
        actual = completion.token_ids[step]
        if actual != token:
            assert margin < SURE, f"request {index}, step {step}: token {actual}, not {token}"
            break
        error = abs(completion.logprobs[step][actual].logprob - logprobs[step])
        assert error <= tolerance, f"request {index}, step {step}: logprob differs by {error:.2e}"
        worst = max(worst, error)
    return worst


def _compare_dynamic(
    indices: Sequence[int],
    outputs: Sequence[Any],
    requests: Sequence[dict[str, Any]],
    references: dict[str, np.ndarray],
) -> str:
    """Compare strengths and texts up to the first step that depends on rounding."""
    worst, steps = 0.0, 0
    for index, output in zip(indices, outputs, strict=True):
        strengths = output.outputs[0].steer_strengths
        names = [
            name
            for name, dose in requests[index]["steer"].items()
            if isinstance(dose, dict) and dose["strength"] == "dynamic"
        ]
        expected, borders = references[f"strengths_{index}"], references[f"borders_{index}"]
        sure = (borders > SURE).all(0) & (references[f"margins_{index}"] > SURE)
        for step in range(len(sure) if sure.all() else int(sure.argmin())):
            for row, name in enumerate(names):
                error = abs(strengths[name][step] - expected[row, step])
                assert error <= 1e-3, f"request {index}, {name}, step {step}: {error:.2e}"
                worst, steps = max(worst, error), steps + 1
            token = int(references[f"tokens_{index}"][step])
            assert output.outputs[0].token_ids[step] == token, f"request {index}, step {step}"
    assert steps, "no step is sure enough to be compared"
    return f"{len(indices)} requests, {steps} strengths, largest difference {worst:.1e}"


def _exact(output: Any) -> list[Any]:
    completion = output.outputs[0]
    return [
        [token, step[token].logprob.hex()]
        for token, step in zip(completion.token_ids, completion.logprobs, strict=True)
    ]


def _difference(actual: list[Any], expected: list[Any]) -> float:
    """The largest difference of a logprob; infinite if the tokens differ."""
    if [token for token, _ in actual] != [token for token, _ in expected]:
        return float("inf")
    pairs = zip(actual, expected, strict=True)
    return max(abs(float.fromhex(a) - float.fromhex(b)) for (_, a), (_, b) in pairs)


def _compiled_from_now_on() -> list[str]:
    """A list to which each Triton kernel that is compiled from now on is appended."""
    import triton

    compiled: list[str] = []
    before = triton.knobs.runtime.jit_post_compile_hook

    def seen(*args: Any, **kwargs: Any) -> Any:
        function = kwargs.get("fn")
        compiled.append(f"{getattr(function, 'module', '')}.{getattr(function, 'name', function)}")
        return before(*args, **kwargs) if before is not None else None

    triton.knobs.runtime.jit_post_compile_hook = seen
    return compiled


def _nothing_of_ours(compiled: list[str], result: dict[str, Any]) -> str:
    """Check that no kernel of the plugin compiled while serving; vLLM's own kernels may."""
    result["compiled_while_serving"] = compiled
    own_kernels = [name for name in compiled if "vllm_steer" in name]
    assert not own_kernels, f"compiled while serving: {', '.join(own_kernels)}"
    return f"{len(compiled)} kernels of others"


def _facts(llm: Any) -> dict[str, Any]:
    """The settings that vLLM chose."""
    import triton
    import vllm

    config = llm.llm_engine.vllm_config
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "runner": "v2" if config.use_v2_model_runner else "v1",
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "compilation_mode": str(config.compilation_config.mode),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
    }


def _graphs(args: argparse.Namespace, result: dict[str, Any]) -> str:
    """Check the CUDA graphs: on a GPU with graphs enabled some were captured, elsewhere none."""
    from vllm.compilation.counter import compilation_counter

    captured = compilation_counter.num_cudagraph_captured
    result["engine"]["graphs_captured"] = captured
    if torch.cuda.is_available() and not args.eager:
        assert captured > 0, "no CUDA graph was captured"
    return f"{captured} graphs, mode {result['engine']['cudagraph_mode']}"


def _arguments() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    parser.add_argument("data", type=Path, help="folder that references.py has written")
    parser.add_argument("--runner", choices=("v1", "v2"), default="v2")
    parser.add_argument("--eager", action="store_true", help="without graphs and compilation")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
