"""Bad requests to load steers, and damaged files: a small part of what ``bad_changes.py`` sends."""

from pathlib import Path

import pytest
from bad_changes import run
from loading_server import KEY

from vllm_steer.environment import API_KEY


@pytest.mark.parametrize(
    ("requests", "files"),
    [(400, 60), pytest.param(8000, 1500, marks=pytest.mark.matrix)],
    ids=["some", "many"],
)
def test_bad_requests_and_damaged_files_are_refused(
    requests: int, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY, KEY)
    report = run(requests, files, tmp_path)
    assert report["faults"] == []
    assert sum(report["statuses"].values()) == requests + files
