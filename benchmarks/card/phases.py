"""The phases of a run on a card: what each asks, how long it may take, what runs beside it.

A group's phases run side by side, the groups one after the other, the most telling first. Where
a later one is cut off, the earlier ones have answered: are the kernels right, is the engine right
with graphs on both runners, what does a steer cost in a step, how near is each kernel to its floor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

PYTEST = (
    *("-m", "pytest", "-q", "-p", "no:cacheprovider"),
    *("-o", "addopts=", "-o", "filterwarnings="),
)


@dataclass(frozen=True)
class Phase:
    """A Python process; ``{json}``, ``{out}``, ``{pack}``, ``{scratch}`` in its command are paths.

    name      of its JSON and its log
    limit_s   after which it is ended with all that it started
    least_s   with less time left it is not begun
    folder    of the pack, where it runs
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    least_s: float = 15.0
    folder: str = "."
    environment: Mapping[str, str] = field(default_factory=dict)


_CPU = {"CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}


def phases(*, dry: bool) -> list[list[Phase]]:
    """The groups, in order."""
    return _dry() if dry else _on_a_card()


def _on_a_card() -> list[list[Phase]]:
    kernels = (*PYTEST, "-n", "6", "--timeout", "90", "--junitxml", "{out}/kernels.xml")
    return [
        [
            Phase(
                "machine",
                ("-m", "benchmarks.card.machine_facts", "{pack}", "{scratch}", "{json}"),
                60,
            )
        ],
        [
            Phase(
                "kernels",
                (
                    *kernels,
                    *("-k", "not sanitizer and not beyond_two_to_the_31"),
                    *("triton/test_lm_steer_card.py", "triton/test_guidance_card.py"),
                    *("triton/test_divergence_card.py", "triton/test_divergence_fused.py"),
                ),
                130,
                folder="tests",
                environment={"OMP_NUM_THREADS": "2"},
            ),
            _engine("engine-v2", "--runner", "v2", limit_s=130),
            _engine("engine-v1", "--runner", "v1", limit_s=130),
        ],
        [
            _speed(
                "steered",
                ("--figures", "steered", "--cases", "64:32,64:1,64:4,1:1,32:32"),
                limit_s=160,
            )
        ],
        [
            Phase(
                "operations",
                (
                    *("-m", "benchmarks.bench_kernels", "--json", "{json}"),
                    *("--grid", "short", "--seconds", "80", "--variants"),
                ),
                100,
            )
        ],
        [
            _speed(
                "guided",
                ("--figures", "guided,idle", "--rows", "1,64", "--cases", "1:1"),
                limit_s=200,
            )
        ],
    ]


def _engine(name: str, *options: str, limit_s: float, data: str = "data") -> Phase:
    return Phase(
        name,
        ("-m", "benchmarks.card.engine_check", f"{{pack}}/{data}", "--json", "{json}", *options),
        limit_s,
    )


def _speed(name: str, options: tuple[str, ...], limit_s: float) -> Phase:
    """An 8B model in bfloat16 with dummy weights, rank 1000, few graphs."""
    return Phase(
        name,
        (
            *("benchmarks/speed_ratio.py", "--json", "{json}", "--shape", "llama-8b"),
            *("--dtype", "bfloat16", "--rank", "1000", "--capture-sizes", "1,4,32,64"),
            *("--gpu-memory", "0.4", "--repeats", "5", "--steps", "30", "--profile", "4"),
            *("--seconds", str(limit_s - 15), *options),
        ),
        limit_s,
        least_s=90,
        environment={"VLLM_LOGGING_LEVEL": "INFO"},
    )


def _dry() -> list[list[Phase]]:
    """The same phases at sizes for a CPU, one after the other; kernels in Triton's interpreter."""
    interpreted = {**_CPU, "TRITON_INTERPRET": "1"}
    pytest = (*PYTEST, "--timeout", "120", "--junitxml", "{out}/kernels.xml")
    speed = ("benchmarks/speed_ratio.py", "--json", "{json}", "--shape", "tiny", "--rank", "16")
    return [
        [
            Phase(
                "machine",
                ("-m", "benchmarks.card.machine_facts", "{pack}", "{scratch}", "{json}"),
                60,
            )
        ],
        [
            Phase(
                "kernels",
                (*pytest, "triton/test_divergence_fused.py", "-k", "own or dose or infinitely"),
                180,
                folder="tests",
                environment=interpreted,
            )
        ],
        [
            _engine("engine-v2", "--runner", "v2", "--eager", limit_s=300, data="few"),
        ],
        [
            _engine("engine-v1", "--runner", "v1", "--eager", limit_s=300, data="few"),
        ],
        [
            Phase(
                "steered",
                (
                    *(*speed, "--quick", "--figures", "steered", "--cases", "4:2"),
                    *("--profile", "1", "--capture-sizes", "1,4"),
                ),
                240,
            )
        ],
        [
            Phase(
                "operations",
                (
                    "-m",
                    "benchmarks.bench_kernels",
                    "--json",
                    "{json}",
                    "--quick",
                    "--grid",
                    "short",
                ),
                180,
            )
        ],
        [Phase("guided", (*speed, "--quick", "--figures", "guided", "--rows", "4"), 240)],
    ]
