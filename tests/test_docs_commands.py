"""The commands of the documentation, run page by page exactly as written."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from vllm_steer.cli import app

REPO = Path(__file__).parents[1]
LIMIT_S = 300
# Pages to look things up in: they have no commands, or need models that are not here.
PROSE = {
    *("ask", "benchmarks", "changelog", "compatibility", "design", "dynamic", "examples", "extend"),
    *(
        "faq",
        "files",
        "glossary",
        "guidance",
        "index",
        "judges",
        "models",
        "loading",
        "operating",
        "real-model",
        "recipes",
        "security",
    ),
    "serve",
}
SHOWN = 3000
# What the tests choose for themselves: a user has none of it.
OURS = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER", "TRITON_INTERPRET")

PAGES = sorted(path for path in (REPO / "docs").glob("*.md") if path.stem not in PROSE)
_FENCE = re.compile(r"^(`{3,})(.*)$")


def blocks(markdown: str, language: str = "sh") -> list[str]:
    """The fenced blocks of one language, in order."""
    result: list[str] = []
    fence, expected, lines = "", False, []
    for line in markdown.splitlines():
        mark = _FENCE.match(line)
        if mark and not fence:
            fence, expected, lines = mark[1], mark[2].strip() == language, []
        elif mark and mark[1] == fence and not mark[2].strip():
            result += ["\n".join(lines)] if expected else []
            fence = ""
        elif fence:
            lines.append(line)
    if fence:
        raise ValueError(f"a block that begins with {fence} does not end")
    return result


def run(commands: list[str], folder: Path, limit_s: float = LIMIT_S) -> str:
    """Run blocks as one script in ``folder``; return the error with its output, else nothing."""
    log = folder.with_name(f"{folder.name}.log")
    saved = {name: value for name, value in os.environ.items() if name not in OURS}
    environment = {
        **saved,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "REPO": str(REPO),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["bash", "-euxo", "pipefail", "-c", "\n".join(commands)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
            ending = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            ending = f"not done after {limit_s:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    message = log.read_text(errors="replace")
    traced = [line for line in message.splitlines() if re.match(r"\++ ", line)]
    return f"{ending}\n{traced[-1] if traced else ''}\n{message[-SHOWN:]}" if ending else ""


def subcommands(command: Any = None, before: str = "vllm-steer") -> list[str]:
    """Every command of the command line as typed."""
    command = command or typer.main.get_command(app)
    if not hasattr(command, "list_commands"):
        return [before]
    return [
        result
        for name in command.list_commands(None)
        for result in subcommands(command.get_command(None, name), f"{before} {name}")
    ]


@pytest.mark.timeout(LIMIT_S + 30)
@pytest.mark.matrix
@pytest.mark.parametrize("page", PAGES, ids=[path.stem for path in PAGES])
def test_the_commands_of_a_page_run_in_an_empty_folder(page: Path, tmp_path: Path) -> None:
    commands = blocks(page.read_text(encoding="utf-8"))
    assert commands, f"{page.name} has no block that begins with ```sh"
    folder = tmp_path / "work"
    folder.mkdir()
    if failure := run(commands, folder):
        pytest.fail(f"{page.name}: {failure}", pytrace=False)


@pytest.mark.parametrize("command", subcommands())
def test_every_command_is_shown_on_a_page(command: str) -> None:
    if command in ("vllm-steer demo", "vllm-steer convert"):
        documented = [
            path.read_text() for path in (REPO / "README.md", *(REPO / "docs").glob("*.md"))
        ]
        documented += ["vllm-steer demo"] if "make demo" in documented[0] else []
    else:
        documented = [block for path in PAGES for block in blocks(path.read_text(encoding="utf-8"))]
    assert any(re.search(rf"{command}(?![\w-])", text) for text in documented)


MARKDOWN = """\
# A page

```sh
echo one > a
FOLDER=$PWD
```

```
echo not a command
```

~~~~
````markdown
```sh
echo inside another block
```
````

```python
print()
```

```sh
cat "$FOLDER/a"
```
"""


def test_blocks_of_commands_are_found_in_order_and_no_others() -> None:
    assert blocks(MARKDOWN) == ["echo one > a\nFOLDER=$PWD", 'cat "$FOLDER/a"']
    assert blocks("```sh\n```") == [""]
    assert blocks("no block") == []
    with pytest.raises(ValueError, match="a block that begins with ``` does not end"):
        blocks("```sh\necho")


def test_blocks_share_one_shell_and_stop_at_the_first_failure(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    assert run(blocks(MARKDOWN), folder) == ""
    failure = run(["echo before", "false | cat", "touch after"], folder)
    assert failure.startswith("exit code 1\n+ ") and "before" in failure
    assert not (folder / "after").exists()
    assert "unbound" in run(["echo $NOT_SET"], folder)
    assert run(['test "$REPO" = "' + str(REPO) + '"; command -v vllm-steer'], folder) == ""


def test_a_command_that_does_not_end_is_ended_with_its_children(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    failure = run(["echo $$ > pid; sleep 61 | cat"], folder, limit_s=1)
    assert failure.startswith("not done after 1 s\n+ ")
    group = int((folder / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(group, 0)
            time.sleep(0.02)


def test_all_commands_of_the_command_line_are_known() -> None:
    methods = ("lm-steer", "low-rank", "concept", "condition", "delta", "vector")
    fits = [f"fit {method}" for method in methods]
    other_commands = (
        "convert",
        "inspect",
        "evidence",
        "transfer",
        "eval",
        "compare",
        "sweep",
        "doctor",
    )
    assert set(subcommands()) == {
        f"vllm-steer {command}" for command in ("demo", *fits, *other_commands)
    }


def output_of_example(name: str, folder: Path) -> str:
    program = REPO / "docs" / "examples" / name
    work = folder / "work"
    work.mkdir()
    if failure := run([f"python {program} > shown.txt"], work):
        pytest.fail(failure, pytrace=False)
    return (work / "shown.txt").read_text(encoding="utf-8")


@pytest.mark.matrix
def test_the_example_of_a_batch_steers_each_request_differently(tmp_path: Path) -> None:
    output = output_of_example("steer_a_batch.py", tmp_path)
    shares = {
        name.strip(): int(share) for name, share in re.findall(r"^(\D+?)(\d+)%", output, re.M)
    }
    assert shares["negative"] < 30 < 60 < shares["positive"]
    assert re.search(r"^French( +\d+%){2} +(9\d|100)%", output, re.M)
    assert "dynamic strengths of the first text: 2.00" in output


@pytest.mark.matrix
def test_the_example_of_a_fit_has_an_effect_that_a_random_steer_lacks(tmp_path: Path) -> None:
    output = output_of_example("fit_and_measure.py", tmp_path)
    ((effect, control),) = re.findall(r"^ +1\.0 +(\S+) +(\S+)$", output, re.M)
    assert float(effect) > 0.3 and float(control) < 0.2
