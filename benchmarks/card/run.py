"""Run all checks and benchmarks for a short time on a machine with a GPU, the most important first.

    cd PACK; python -m benchmarks.card.run . OUT [--seconds 570] [--scratch FOLDER] [--dry]

``PACK`` is the folder that ``pack.py`` made, ``OUT`` an empty one. This script uses only the
standard library: each phase is a process with its own time limit, and a failed phase does not stop
a later one. Each leaves its JSON and its log in ``OUT``; the summary is in ``summary.json`` and is
printed last. An unpacked vLLM and all caches go to ``--scratch``, else to a temporary folder.
``--dry`` is for a machine without a GPU: the same phases at tiny sizes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.card.phases import Phase, phases
from benchmarks.processes import end_group

GRACE_S = 5
POLL_S = 0.2


@dataclass(frozen=True)
class Places:
    """The folders of a run: the pack, the results, and scratch files."""

    pack: Path
    out: Path
    scratch: Path


class Running:
    """A running phase."""

    def __init__(self, phase: Phase, places: Places, limit_s: float) -> None:
        self.phase = phase
        self.limit_s = limit_s
        self._json = places.out / f"{phase.name}.json"
        self._log = places.out / f"{phase.name}.log"
        self._begun = time.monotonic()
        placeholders = {f"{{{name}}}": path for name, path in vars(places).items()}
        placeholders["{json}"] = self._json
        command = [_filled(part, placeholders) for part in phase.command]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                cwd=places.pack / phase.folder,
                env={**os.environ, **_environment(places, phase)},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def ended(self) -> dict[str, Any] | None:
        """The result after its end or its time limit; None while it runs."""
        seconds = time.monotonic() - self._begun
        code = self._process.poll()
        if code is None and seconds < self.limit_s:
            return None
        state = "ok" if code == 0 else f"exit {code}"
        if code is None:
            state = f"stopped at its limit of {self.limit_s:.0f} s"
            end_group(self._process, GRACE_S)
        return {
            "phase": self.phase.name,
            "state": state,
            "seconds": round(seconds, 1),
            "said": self._report_text(),
        }

    def _report_text(self) -> str:
        """The summary of its JSON, or the last line of its log if the JSON is missing or
        incomplete.
        """
        try:
            result = json.loads(self._json.read_text())
        except (OSError, ValueError):
            result = {}
        if "summary" in result:
            return str(result["summary"])[:400]
        if "rows" in result:
            left_out = len(result.get("left_out") or ())
            return f"{len(result['rows'])} lines" + (f", {left_out} left out" * bool(left_out))
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""


class Summary:
    """The results of the phases so far, in ``summary.json``."""

    def __init__(self, args: argparse.Namespace, places: Places) -> None:
        self._path = places.out / "summary.json"
        facts = json.loads((places.pack / "made.json").read_text())
        self.phases: list[dict[str, Any]] = []
        self._data = {
            "dry": args.dry,
            "seconds": args.seconds,
            "pack": facts,
            "phases": self.phases,
        }
        self._write()

    def add(self, result: dict[str, Any]) -> None:
        """Add the result of a phase."""
        self.phases.append({"phase": "", "state": "", "seconds": 0, "said": "", **result})
        self._write()
        print(self.line(self.phases[-1]), flush=True)

    def line(self, result: dict[str, Any]) -> str:
        """One line about a phase, for the terminal."""
        return "{phase:<18} {state:<10} {seconds:>6} s  {said}".format(**result)

    def _write(self) -> None:
        self._path.write_text(json.dumps(self._data, indent=1) + "\n")


def main() -> int:
    """Run the phases by group and print the summary; returns 0 if all are ok."""
    args = _arguments()
    with tempfile.TemporaryDirectory(prefix="card-") as temporary:
        scratch = args.scratch or Path(temporary)
        places = Places(args.pack.resolve(), args.out.resolve(), scratch.resolve())
        places.out.mkdir(parents=True, exist_ok=True)
        summary = Summary(args, places)
        deadline = time.monotonic() + args.seconds
        for group in phases(dry=args.dry):
            chosen = [phase for phase in group if not args.only or phase.name in args.only]
            _run(chosen, places, deadline, summary)
    print("\nSUMMARY", *map(summary.line, summary.phases), sep="\n", flush=True)
    return 0 if all(result["state"] == "ok" for result in summary.phases) else 1


def _run(group: list[Phase], places: Places, deadline: float, summary: Summary) -> None:
    """Run phases in parallel until all have ended."""
    running = []
    for phase in group:
        limit = min(phase.limit_s, deadline - time.monotonic() - GRACE_S)
        if limit < phase.least_s:
            summary.add({"phase": phase.name, "state": "left out"})
            continue
        print(f"{phase.name}: begins, at most {limit:.0f} s", flush=True)
        try:
            running.append(Running(phase, places, limit))
        except OSError as error:
            summary.add({"phase": phase.name, "state": f"did not start: {error}"})
    while running:
        time.sleep(POLL_S)
        for running_phase in list(running):
            if result := running_phase.ended():
                running.remove(running_phase)
                summary.add(result)


def _filled(part: str, places: dict[str, Path]) -> str:
    for name, path in places.items():
        part = part.replace(name, str(path))
    return part


def _environment(places: Places, phase: Phase) -> dict[str, str]:
    """The environment: packages of the pack come first, and every process has its own caches."""
    pack, scratch = places.pack, places.scratch
    folders = [pack / "site", scratch / "vllm", pack / "tests", pack / "extra"]
    python_path = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": os.pathsep.join(
            [*map(str, folders), *([python_path] if python_path else [])]
        ),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(scratch / "caches" / phase.name),
        **phase.environment,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=570.0, help="for all phases together")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="for vLLM and caches")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), metavar="NAME,...", help="these phases only"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
