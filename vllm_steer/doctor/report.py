"""The report: all findings in order, as a table."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from vllm_steer.doctor.architecture import Architecture, describe
from vllm_steer.doctor.environment import environment
from vllm_steer.doctor.finding import Finding, State
from vllm_steer.doctor.memory import config_memory, example_memory
from vllm_steer.doctor.parity import PART as PARITY
from vllm_steer.doctor.parity import parity
from vllm_steer.doctor.sizes import sizes as measured_sizes
from vllm_steer.errors import SteerError, cause
from vllm_steer.tables import Column, StyledText, Table

_COLOURS: Final[Mapping[State, str]] = {
    "ok": "green",
    "warning": "yellow",
    "FAILED": "bold red",
    "not tested": "yellow",
    "missing": "dim",
    "-": "dim",
}


def examine(
    architecture: Architecture,
    *,
    dtype: str = "auto",
    engine: bool = True,
    options: Mapping[str, Any] | None = None,
    steer_config: str | None = None,
    sizes: bool | None = None,
) -> Iterator[Finding]:
    """Examine a model and yield all findings.

    ``dtype`` and ``options`` are engine arguments of the parity trials, which ``engine`` False
    skips; ``steer_config`` names a config whose steers' memory is reported. Memory is that for the
    engine's dtype; without an engine for ``dtype``, where ``auto`` is the config's. ``sizes``
    measures the model's activations and gives first strengths of the config's steers; None: as
    ``engine``, because it too loads the model. Raises ``SteerError`` for a steer config that cannot
    be read.
    """
    environment_findings = list(environment())
    yield from environment_findings
    yield from describe(architecture)
    engine_dtype = architecture.dtype if dtype == "auto" else getattr(torch, dtype)
    for finding in _parity(
        architecture, {**(options or {}), "dtype": dtype}, environment_findings, engine=engine
    ):
        yield finding
        engine_dtype = getattr(torch, finding.figures.get("dtype", ""), engine_dtype)
    if steer_config is None:
        yield from example_memory(architecture, engine_dtype)
    else:
        yield from config_memory(architecture, steer_config, engine_dtype)
    if engine if sizes is None else sizes:
        yield from measured_sizes(architecture, steer_config, dtype)


def _parity(
    architecture: Architecture,
    options: Mapping[str, Any],
    environment_findings: Sequence[Finding],
    *,
    engine: bool,
) -> Iterator[Finding]:
    """The findings of the trials, or the reason why there are none; the engine's has its dtype."""
    if not engine:
        yield Finding(PARITY, "engine", "not tested", "switched off by --no-engine")
        return
    if problem := next(
        (finding for finding in environment_findings if finding.state == "FAILED"), None
    ):
        yield Finding(PARITY, "engine", "not tested", f"{problem.name}: {problem.message}")
        return
    try:
        yield from parity(architecture, options)
    except SteerError as error:
        yield Finding(PARITY, "engine", "FAILED", str(error))
    except torch.OutOfMemoryError as error:
        yield Finding(PARITY, "Hugging Face", "not tested", f"out of memory: {cause(error)}")


def failed(findings: Sequence[Finding]) -> bool:
    """Whether something that should work does not."""
    return any(finding.state == "FAILED" for finding in findings)


def table(model: str, findings: Sequence[Finding]) -> Table:
    """The findings as a table, grouped by part."""
    rows, ends, part = [], [], ""
    for index, finding in enumerate(findings):
        if finding.part != part:
            ends.append(index - 1)
        name = finding.part if finding.part != part else ""
        state = StyledText(finding.state, _COLOURS[finding.state])
        rows.append((name, finding.name, state, finding.message))
        part = finding.part
    headings = [Column(heading, wrap=False) for heading in ("", "", "state")]
    return Table(f"vllm-steer on {model}", [*headings, Column("")], rows, lines=ends, text_column=3)
