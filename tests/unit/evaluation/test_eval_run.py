"""Run folders: finished conditions are kept, other runs are refused, files are atomic."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vllm_steer import SteerError
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.run import Condition, condition_grid, open_run
from vllm_steer.files.atomic_write import unfinished_name

SETTINGS: dict[str, Any] = {"model": "m", "sampling": {"seed": 0, "top_p": 0.9}, "layers": (1, 2)}
ANSWERS = [Answers("Who?", (" It's me.", "\n…")), Answers("Why?", ("", " No."))]
FIVE = Condition("steer", 5.0)


def test_the_unsteered_model_stands_once_beside_steer_and_control() -> None:
    names = [setting.name for setting in condition_grid((-2.0, 0.0, 0.5))]
    assert names == ["none", "steer-2", "steer+0.5", "random-2", "random+0.5"]


def test_texts_come_back_as_they_were_written_in_the_authors_form(tmp_path: Path) -> None:
    run = open_run(tmp_path / "new" / "run", SETTINGS)
    run.write(FIVE, ANSWERS)
    assert run.read(FIVE) == ANSWERS
    rows = (tmp_path / "new/run/generations/steer+5.jsonl").read_text().splitlines()
    assert json.loads(rows[1]) == {
        "prompt": {"text": "Why?"},
        "generations": [{"text": ""}, {"text": " No."}],
        "steer": "steer",
        "strength": 5.0,
    }


def test_only_settings_without_texts_are_missing(tmp_path: Path) -> None:
    settings = condition_grid((0.0, 5.0))
    run = open_run(tmp_path, SETTINGS)
    assert run.missing(settings) == settings
    run.write(FIVE, ANSWERS)
    again = open_run(tmp_path, SETTINGS)
    assert [setting.name for setting in again.missing(settings)] == ["none", "random+5"]


def test_the_folder_of_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    open_run(tmp_path, SETTINGS).write(FIVE, ANSWERS)
    other = {**SETTINGS, "sampling": {"seed": 0, "top_p": 1.0}}
    expected = (
        r"other settings: sampling\.top_p was 0\.9 and is now 1\.0; give the same settings to "
        r"resume it, another folder, or --restart \(restart=True\) to discard it"
    )
    with pytest.raises(SteerError, match=expected):
        open_run(tmp_path, other)
    with pytest.raises(SteerError, match="phase was None and is now 'prompt'"):
        open_run(tmp_path, {**SETTINGS, "phase": "prompt"})
    with pytest.raises(SteerError, match=r"layers was \[1, 2\] and is now None"):
        open_run(tmp_path, {k: v for k, v in SETTINGS.items() if k != "layers"})
    assert open_run(tmp_path, SETTINGS).read(FIVE) == ANSWERS


def test_of_many_differences_the_first_are_named_and_digests_not_shown(tmp_path: Path) -> None:
    digests = {"file": "a" * 64, **dict.fromkeys("pqrs", 1)}
    open_run(tmp_path, digests).write(FIVE, ANSWERS)
    expected = (
        "settings: different file; p was 1 and is now 2; q was 1 and is now 2 and 2 more; give"
    )
    with pytest.raises(SteerError, match=expected):
        open_run(tmp_path, {"file": "b" * 64, **dict.fromkeys("pqrs", 2)})


def test_a_run_without_texts_gives_its_folder_to_another(tmp_path: Path) -> None:
    open_run(tmp_path, SETTINGS)  # the engine did not start, say
    other = open_run(tmp_path, {**SETTINGS, "model": "n"})
    other.write(FIVE, ANSWERS)
    with pytest.raises(SteerError, match="model was 'n' and is now 'm'"):
        open_run(tmp_path, SETTINGS)


def test_restart_discards_the_run_and_nothing_else(tmp_path: Path) -> None:
    run = open_run(tmp_path, SETTINGS)
    run.write(FIVE, ANSWERS)
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    again = open_run(tmp_path, {**SETTINGS, "model": "n"}, restart=True)
    assert again.missing([FIVE]) == [FIVE]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "generations",
        "notes.txt",
        "settings.json",
    ]
    assert json.loads((tmp_path / "settings.json").read_text())["model"] == "n"


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_with_other_things_is_refused(tmp_path: Path, restart: bool) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / "generations").mkdir()
    (tmp_path / "generations" / "mine.jsonl").write_text("precious")
    with pytest.raises(SteerError, match=r"thesis\.tex and is not a run folder; give a new"):
        open_run(tmp_path, SETTINGS, restart=restart)
    assert (tmp_path / "generations" / "mine.jsonl").read_text() == "precious"


@pytest.mark.parametrize("restart", [False, True])
def test_another_programs_settings_are_no_run(tmp_path: Path, restart: bool) -> None:
    (tmp_path / "settings.json").write_text('{"editor.fontSize": 12}')
    with pytest.raises(SteerError, match=r"holds settings\.json and is not a run folder"):
        open_run(tmp_path, SETTINGS, restart=restart)
    assert (tmp_path / "settings.json").exists()


def test_the_unfinished_file_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    (tmp_path / unfinished_name("settings.json")).write_text("{")
    run = open_run(tmp_path, SETTINGS)
    (tmp_path / "generations" / unfinished_name("none.jsonl")).write_text("{")
    unrelated = [tmp_path / "thesis.unfinished", tmp_path / "generations" / "mine.unfinished"]
    for path in unrelated:
        path.write_text("precious")
    assert open_run(tmp_path, SETTINGS).missing([Condition("none", 0.0)])
    assert sorted(tmp_path.rglob("*.unfinished")) == sorted(unrelated)
    assert run.missing([FIVE]) == [FIVE]


def test_a_changed_file_of_texts_is_named(tmp_path: Path) -> None:
    run = open_run(tmp_path, SETTINGS)
    (tmp_path / "generations" / "steer+5.jsonl").write_text('{"prompt": {"text"')
    with pytest.raises(SteerError, match=r"steer\+5\.jsonl: the file is damaged .*delete it"):
        run.read(FIVE)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(SteerError, match=r"settings\.json: invalid JSON .*give another folder"):
        open_run(tmp_path, SETTINGS)


def test_an_invalid_folder_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SteerError, match=r"file/run: cannot be used \(Not a directory\)"):
        open_run(tmp_path / "file" / "run", SETTINGS)


def test_a_full_disk_keeps_earlier_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(tmp_path, SETTINGS)
    run.write(FIVE, ANSWERS)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SteerError, match=r"random\+5\.jsonl: cannot be written .*No space left"):
        run.write(Condition("random", 5.0), ANSWERS)
    assert run.missing([FIVE, Condition("random", 5.0)]) == [Condition("random", 5.0)]
    assert [p.name for p in (tmp_path / "generations").iterdir()] == ["steer+5.jsonl"]


def test_half_a_surrogate_pair_is_kept(tmp_path: Path) -> None:
    run = open_run(tmp_path, {"model": "m\udcff"})
    generated = [Answers("Who\ud800?", ("\udcff é \x9b",))]
    run.write(FIVE, generated)
    assert open_run(tmp_path, {"model": "m\udcff"}).read(FIVE) == generated


@pytest.mark.parametrize(
    "row",
    [
        *("[" * 100_000, "[1]", "{}", '{"prompt": 1, "generations": 1}', "null", "\x00"),
        '{"prompt": {"text": "a"}, "generations": [{"text": "b", "steer_strengths": [1]}]}',
    ],
    ids=range(7),
)
def test_a_hostile_file_of_texts_is_one_error(tmp_path: Path, row: str) -> None:
    run = open_run(tmp_path, SETTINGS)
    (tmp_path / "generations" / "steer+5.jsonl").write_text(row)
    with pytest.raises(SteerError, match=r"steer\+5\.jsonl: the file is damaged"):
        run.read(FIVE)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"made_by": "x"}', "\x00"])
def test_hostile_settings_are_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(SteerError, match=r"invalid JSON|is not a run folder"):
        open_run(tmp_path, SETTINGS)
    (tmp_path / "settings.json").unlink()
    os.mkfifo(tmp_path / "settings.json")
    with pytest.raises(SteerError, match=r"holds settings\.json and is not a run folder"):
        open_run(tmp_path, SETTINGS)


def test_discarding_a_run_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    run = open_run(tmp_path, SETTINGS)
    run.write(FIVE, ANSWERS)
    (tmp_path / "generations" / "notes.txt").write_text("mine")
    open_run(tmp_path, {**SETTINGS, "model": "n"}, restart=True)
    assert [p.name for p in (tmp_path / "generations").iterdir()] == ["notes.txt"]
