"""Options that ``eval``, ``compare`` and ``sweep`` share: prompts, run folder, sampling, engine."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vllm_steer.errors import SteerError

if TYPE_CHECKING:
    from vllm_steer.evaluation.generation import EngineOptions
    from vllm_steer.evaluation.sampling import Sampling

_SAMPLING: Final = (
    "samples",
    "max_tokens",
    "exact_length",
    "temperature",
    "top_p",
    "top_k",
    "seed",
)
_DOSE: Final = ("layers", "phase", "schedule", "low", "high", "when")
_ENGINE: Final = (
    "dtype",
    "max_model_len",
    "gpu_memory_utilization",
    "tensor_parallel_size",
    "enforce_eager",
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or 'embedded'.")]
SteerFile = Annotated[
    Path, typer.Argument(metavar="STEER", help="Steer file in any supported format.")
]
Prompts = Annotated[Path, typer.Option(help="Prompts: .jsonl, .json, .csv, .tsv or .txt.")]
PromptField = Annotated[str, typer.Option(help="Name of the prompt in a row.")]
First = Annotated[int | None, typer.Option(min=1, help="Use only the first N prompts.")]
Out = Annotated[Path, typer.Option(help="Folder of the run; an interrupted run resumes.")]
Phase = Annotated[
    str | None,
    typer.Option(
        help="all, prompt, generation, text, answer, last, or windows as JSON: "
        '\'{"answer": "0:8"}\'.'
    ),
]
Low = Annotated[str | None, typer.Option(help="Lower bound of a projection or feature, or -inf.")]
High = Annotated[str | None, typer.Option(help="Upper bound of a projection or feature, or inf.")]
When = Annotated[
    str | None,
    typer.Option(help="Condition that decides about each prompt, or JSON: '{\"any\": [...]}'."),
]
Conditions = Annotated[
    list[str] | None,
    typer.Option("--condition", metavar="NAME=FILE", help="A condition; may be repeated."),
]
Restart = Annotated[bool, typer.Option("--restart", help="Discard the folder's run.")]
Plot = Annotated[bool, typer.Option(help="Draw the report as PNG.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Preset = Annotated[str | None, typer.Option(help="lm-steer: the authors' settings.")]
Samples = Annotated[int | None, typer.Option(help="Texts per prompt [25].")]
MaxTokens = Annotated[int | None, typer.Option(help="Maximum new tokens [20].")]
ExactLength = Annotated[
    bool | None,
    typer.Option(help="Generate exactly the maximum of tokens."),
]
Temperature = Annotated[float | None, typer.Option(help="Temperature; 0 is greedy [1].")]
TopP = Annotated[float | None, typer.Option(help="Nucleus sampling [1].")]
TopK = Annotated[int | None, typer.Option(help="Top-k sampling; 0 for all [50].")]
Seed = Annotated[int | None, typer.Option(help="Seed of the first text [0].")]
Dtype = Annotated[str, typer.Option(help="As for vllm serve.")]
MaxModelLen = Annotated[int | None, typer.Option(help="As for vllm serve.")]
GpuMemoryUtilization = Annotated[
    float | None,
    typer.Option(help="As for vllm serve [on a CPU: VLLM_CPU_KVCACHE_SPACE GiB, or 2 GiB]."),
]
TensorParallelSize = Annotated[int, typer.Option(help="As for vllm serve.")]
EnforceEager = Annotated[bool, typer.Option("--enforce-eager", help="As for vllm serve.")]


def sampling(params: Mapping[str, Any]) -> "Sampling":
    """The ``Sampling`` of a command's options."""
    from vllm_steer.evaluation.sampling import sampling_of

    return sampling_of(params["preset"], {name: params.get(name) for name in _SAMPLING})


def engine_options(params: Mapping[str, Any]) -> "EngineOptions":
    """The ``EngineOptions`` of a command's options."""
    from vllm_steer.evaluation.generation import EngineOptions

    return EngineOptions(**{name: params[name] for name in _ENGINE})


def dose_options(params: Mapping[str, Any], *, without: Collection[str] = ()) -> dict[str, Any]:
    """The options of a dose that were given; ``phase`` and ``when`` may be JSON.

    Raises ``SteerError`` for a text that begins like a JSON object and is none.
    """
    from vllm_steer.files.json_text import read_json

    given = {name: params.get(name) for name in _DOSE if name not in without}
    return {
        name: read_json(value, f"--{name}") if value.lstrip().startswith("{") else value
        for name, value in given.items()
        if value is not None
    }


def condition_files(given: Sequence[str] | None) -> dict[str, Path]:
    """The files of conditions by name, from ``NAME=FILE``.

    Raises ``SteerError`` for another form, and for a name that is given twice.
    """
    files: dict[str, Path] = {}
    for text in given or ():
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise SteerError(f"condition is {text!r}; expected NAME=FILE")
        if name in files:
            raise SteerError(f"condition {name} is given twice; give each name once")
        files[name] = Path(path)
    return files
