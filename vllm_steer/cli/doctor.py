"""``vllm-steer doctor``: checks whether steering works with a model on this machine."""

import sys
from typing import Annotated

import typer

from vllm_steer.cli.terminal import Console, say_json
from vllm_steer.errors import SteerError

_LONGEST = 100
DTYPES = ("auto", "float32", "float16", "bfloat16")


def doctor(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or 'embedded'.")],
    steer_config: Annotated[
        str | None, typer.Option(help="Steer config: report the memory of its steers.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"The engine's dtype: {', '.join(DTYPES)}.")] = "auto",
    engine: Annotated[
        bool, typer.Option(help="Start a vLLM engine and compare it with Hugging Face.")
    ] = True,
    sizes: Annotated[
        bool | None,
        typer.Option(
            help="Measure activations, and report first strengths of the config's steers "
            "[as --engine]."
        ),
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(min=32, help="As for vllm serve.")] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1.0,
            help="As for vllm serve [on a CPU: VLLM_CPU_KVCACHE_SPACE GiB, or 2 GiB].",
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(min=1, help="As for vllm serve.")
    ] = None,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help="As for vllm serve.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every finding as JSON.")] = False,
) -> None:
    """Check what works with MODEL: environment, sites, parity with Hugging Face, memory, sizes."""
    from vllm_steer.config import SteerConfig
    from vllm_steer.doctor.architecture import read_architecture
    from vllm_steer.doctor.report import examine, failed, table

    if dtype not in DTYPES:
        raise SteerError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    engine_options = {
        "max_model_len": max_model_len,
        "gpu_memory_utilization": gpu_memory_utilization,
        "tensor_parallel_size": tensor_parallel_size,
        "enforce_eager": enforce_eager,
    }
    options = {name: value for name, value in engine_options.items() if value is not None}
    architecture = read_architecture(model)
    if steer_config is not None:
        SteerConfig.load(steer_config)  # fail before the long trials
    findings = []
    console = Console(stderr=True)
    with console.status("checking the installation ...") as status:
        for finding in examine(
            architecture,
            dtype=dtype,
            engine=engine,
            options=options,
            steer_config=steer_config,
            sizes=sizes,
        ):
            findings.append(finding)
            text = f"{finding.part}: after {finding.name} ..."
            status.update(console.text(text, longest=_LONGEST))
    if as_json:
        say_json({"model": model, "findings": [f.as_json for f in findings]})
    else:
        Console().print(table(model, findings))
    if failed(findings):
        sys.exit(1)
