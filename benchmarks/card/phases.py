"""The phases of a run on a GPU: the command, the time limit and the parallel phases of each.

A group's phases run in parallel, the groups in sequence, the most important first, so that an early
end loses the least. The groups check that the kernels are correct, that the engine is correct with
graphs on both runners, what a steer costs in a step, and how near each kernel is to its floor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

PYTEST = (
    *("-m", "pytest", "-q", "-p", "no:cacheprovider"),
    *("-o", "addopts=", "-o", "filterwarnings=", "--junitxml", "{out}/kernels.xml"),
)
SPEED_RATIO = ("benchmarks/speed_ratio.py", "--json", "{json}")
_CPU = {"CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}


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


def phases(*, dry: bool) -> list[list[Phase]]:
    """The groups of phases, in order."""
    return _dry() if dry else _on_a_card()


def _on_a_card() -> list[list[Phase]]:
    short = ("--grid", "short", "--seconds", "80", "--variants")
    return [
        [_machine()],
        [
            Phase(
                "kernels",
                (
                    *(*PYTEST, "-n", "6", "--timeout", "90"),
                    *("-k", "not sanitizer and not beyond_two_to_the_31"),
                    *("triton/test_lm_steer_card.py", "triton/test_guidance_card.py"),
                    *("triton/test_divergence_card.py", "triton/test_divergence_fused.py"),
                ),
                130,
                folder="tests",
                environment={"OMP_NUM_THREADS": "2"},
            ),
            _engine("v2", limit_s=150),
            _engine("v1", limit_s=150),
            _engine("v2", limit_s=150, name="reading"),
            _engine("v1", limit_s=150, name="reading"),
        ],
        [_speed("steered", "--cases", "64:32,64:1,64:4,1:1,32:32", limit_s=160)],
        [Phase("operations", _module("bench_kernels", *short), 100)],
        [_speed("guided,idle", "--rows", "1,64", "--cases", "1:1", limit_s=200)],
    ]


def _dry() -> list[list[Phase]]:
    """The same phases at sizes for a CPU; kernels in Triton's interpreter."""
    some = ("triton/test_divergence_fused.py", "-k", "own or dose or infinitely")
    quick = ("--quick", "--shape", "tiny", "--rank", "16", "--figures")
    steered = ("--cases", "4:2", "--profile", "1", "--capture-sizes", "1,4")
    return [
        [_machine()],
        [
            Phase(
                "kernels",
                (*PYTEST, "--timeout", "120", *some),
                180,
                folder="tests",
                environment={**_CPU, "TRITON_INTERPRET": "1"},
            )
        ],
        [_dry_engine("v2"), _dry_engine("v2", "reading")],
        [_dry_engine("v1"), _dry_engine("v1", "reading")],
        [Phase("steered", (*SPEED_RATIO, *quick, "steered", *steered), 240)],
        [Phase("operations", _module("bench_kernels", "--quick", "--grid", "short"), 180)],
        [Phase("guided", (*SPEED_RATIO, *quick, "guided", "--rows", "4"), 240)],
    ]


def _module(name: str, *options: str) -> tuple[str, ...]:
    return ("-m", f"benchmarks.{name}", "--json", "{json}", *options)


def _machine() -> Phase:
    return Phase("machine", _module("card.machine_facts", "{pack}", "{scratch}"), 60)


def _engine(
    runner: str, *options: str, limit_s: float, name: str = "engine", data: str = ""
) -> Phase:
    """Engines of one runner with the requests of a folder: that of the name, or ``data``."""
    check = _module("card.engine_check", f"{{pack}}/{data or name}", "--runner", runner, *options)
    return Phase(f"{name}-{runner}", check, limit_s)


def _dry_engine(runner: str, name: str = "engine") -> Phase:
    return _engine(runner, "--eager", limit_s=300, name=name, data=f"few-{name}")


def _speed(figures: str, *options: str, limit_s: float) -> Phase:
    """An 8B model in bfloat16 with dummy weights, rank 1000, few graphs."""
    command = (
        *(*SPEED_RATIO, "--shape", "llama-8b", "--dtype", "bfloat16", "--rank", "1000"),
        *("--figures", figures, "--capture-sizes", "1,4,32,64", "--gpu-memory", "0.4"),
        *("--repeats", "5", "--steps", "30", "--profile", "4"),
        *("--seconds", str(limit_s - 15), *options),
    )
    noisy = {"VLLM_LOGGING_LEVEL": "INFO"}
    return Phase(figures.partition(",")[0], command, limit_s, least_s=90, environment=noisy)
