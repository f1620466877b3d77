"""Loading, unloading and a request's own steers through the middleware, on fake engines."""

import json
from pathlib import Path
from typing import Any

import pytest
from loading_server import COMPLETIONS, KEY, LOAD, UNLOAD, FakeServer, encoded, fake_server
from loading_tools import lm_steer

from vllm_steer import save_steer
from vllm_steer.environment import API_KEY
from vllm_steer.runtime.steer_file import path_in


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    for seed in range(4):
        save_steer(lm_steer(seed), folder / f"{seed}.safetensors")
    return folder


@pytest.fixture
def serving(tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    monkeypatch.setenv(API_KEY, KEY)
    return fake_server(tmp_path, folders=[str(files)])


def test_a_description_that_leads_out_of_the_folders_is_not_read(
    serving: FakeServer, files: Path, tmp_path: Path
) -> None:
    """An SAE's file is read with the ``cfg.json`` beside it, other files are not."""
    body = {"steer_name": "a", "steer_path": str(files / "0.safetensors")}
    (tmp_path / "secret.json").write_text("{}")
    (files / "cfg.json").symlink_to(tmp_path / "secret.json")
    refused = serving.post(LOAD, {**body, "kind": "sae", "feature": 0})
    assert (refused.status, "leads out of the allowed" in refused.message) == (401, True)
    assert serving.post(LOAD, body).status == 200


def test_a_link_keeps_its_name_and_its_neighbours(files: Path) -> None:
    """As in the cache of a model hub, where files are links into a folder of contents."""
    blobs, snapshot = files / "blobs", files / "snapshots"
    blobs.mkdir()
    snapshot.mkdir()
    for name, blob in {"sae_weights.safetensors": "1a", "cfg.json": "2b"}.items():
        (blobs / blob).write_text("{}")
        (snapshot / name).symlink_to(blobs / blob)
    given = snapshot / "sae_weights.safetensors"
    assert path_in([files.resolve()], str(given), with_config=True) == given


def test_a_request_brings_its_own_condition(serving: FakeServer, files: Path) -> None:
    data = encoded(files / "0.safetensors")
    body = {
        "prompt": "x",
        "steer": {"a": {"strength": 1, "when": {"any": ["mine"]}}},
        "steer_files": {"a": data, "mine": data, "unused": data},
    }
    refused = serving.post(COMPLETIONS, body)
    assert "steer_files has unused, which steer does not name" in refused.message
    del body["steer_files"]["unused"]  # type: ignore[attr-defined]
    refused = serving.post(COMPLETIONS, body)  # an LM-Steer is no condition
    assert "steer a has when 'mine', which is no condition; conditions: none" in refused.message


def test_a_steer_is_loaded_used_replaced_and_unloaded(serving: FakeServer, files: Path) -> None:
    path = str(files / "0.safetensors")
    loaded = serving.post(LOAD, {"steer_name": "a", "steer_path": path, "default_strength": 2})
    assert loaded.status == 200
    digest = loaded.body.pop("digest")
    assert loaded.body == {
        "id": "a",
        "object": "steer",
        "kind": "lm_steer",
        "site": "head",
        "layers": None,
        "mode": None,
        "default_strength": 2.0,
        "limit": None,
        "source": "runtime",
        "in_use": 0,
    }
    used = serving.post(COMPLETIONS, {"steer": "a", "prompt": "x"}, key=None)
    assert used.headers["x-steer"] == f"a:2@{digest[:12]}"
    data = encoded(files / "1.safetensors")
    again = serving.post(LOAD, {"steer_name": "a", "steer_data": data, "load_inplace": True})
    assert again.status == 200
    assert again.body["digest"] != digest
    used = serving.post(COMPLETIONS, {"steer": {"a": {"strength": -0.5}}}, key=None)
    assert used.headers["x-steer"] == f"a:-0.5@{again.body['digest'][:12]}"
    gone = serving.post(UNLOAD, {"steer_name": "a"})
    assert (gone.status, gone.body["unloaded"]) == (200, True)
    refused = serving.post(COMPLETIONS, {"steer": "a"}, key=None)
    assert (refused.status, refused.headers["x-steer"]) == (400, "none")
    assert refused.message == "steer 'a' is unknown; steers: none"


def test_a_change_needs_the_key(serving: FakeServer, files: Path) -> None:
    body = {"steer_name": "a", "steer_path": str(files / "0.safetensors")}
    for key in (None, "", "another", KEY + " ", KEY[:-1]):
        for path in (LOAD, UNLOAD):
            answer = serving.post(path, body, key=key)
            assert answer.status == 401
            assert "Authorization: Bearer KEY" in answer.message
            assert KEY not in answer.message
    assert serving.loading.registry.names().steers == {}
    assert serving.got == []


def test_a_server_that_says_so_takes_changes_without_a_key(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    open_server = fake_server(tmp_path, folders=[str(files)], unprotected=True)
    body = {"steer_name": "a", "steer_path": str(files / "0.safetensors")}
    assert open_server.post(LOAD, body, key=None).status == 200


def test_a_server_that_loads_nothing_says_so(tmp_path: Path, files: Path) -> None:
    closed = fake_server(tmp_path)
    closed.plan = closed.state.vllm_config.additional_config["steer"]["runtime"]
    closed.plan["enabled"] = False  # type: ignore[index]
    closed.state.vllm_config.additional_config["steer"] = dict(
        closed.state.vllm_config.additional_config["steer"]
    )
    answer = closed.post(LOAD, {"steer_name": "a", "steer_data": encoded(files / "0.safetensors")})
    assert answer.status == 404
    assert "set runtime: {enabled: true} in its steer config" in answer.message


BAD: list[tuple[Any, int, str]] = [
    (b"", 400, "is not JSON"),
    (b"[1]", 400, "the request is no object"),
    (b"\xff", 400, "not in UTF-8"),
    ({}, 400, "give one of steer_path and steer_data"),
    ({"steer_name": "a"}, 400, "give one of steer_path and steer_data"),
    ({"steer_name": "a", "steer_path": "x", "steer_data": "x"}, 400, "give one of"),
    ({"steer_name": "a", "steer_path": "/etc/passwd"}, 401, "is outside the allowed folders"),
    ({"steer_name": "a", "steer_path": "FILES/../../x"}, 401, "is outside the allowed folders"),
    ({"steer_name": "a", "steer_path": "FILES/no"}, 404, "no such file"),
    ({"steer_name": "a", "steer_path": ["x"]}, 400, "expected a path"),
    ({"steer_name": "a", "steer_path": "x\0"}, 400, "expected a path"),
    ({"steer_name": "a", "steer_data": "?"}, 400, "is not base64"),
    ({"steer_name": "a", "steer_data": 5}, 400, "expected a file in base64"),
    ({"steer_name": "a", "steer_data": "AAAA"}, 422, "neither a safetensors file nor"),
    ({"steer_name": "a/b", "steer_data": "AAAA"}, 400, "cannot be a steer's name"),
    ({"steer_name": 3, "steer_data": "AAAA"}, 400, "cannot be a steer's name"),
    ({"steer_name": "a", "steer_path": "FILES/0.safetensors", "load_inplace": 1}, 400, "expected"),
    ({"steer_name": "a", "steer_path": "FILES/0.safetensors", "what": 1}, 400, "what"),
    ({"steer_name": "a", "steer_path": "FILES/0.safetensors", "path": "/x"}, 400, "use steer_path"),
    ({"steer_name": "a", "steer_path": "FILES/0.safetensors", "layers": "0"}, 422, "layers"),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_load_is_refused_with_a_message(
    serving: FakeServer, files: Path, body: Any, status: int, message: str
) -> None:
    if isinstance(body, dict) and isinstance(body.get("steer_path"), str):
        body = {**body, "steer_path": body["steer_path"].replace("FILES", str(files))}
    answer = serving.post(LOAD, body)
    assert (answer.status, answer.body["error"]["code"]) == (status, status)
    assert message in answer.message
    assert serving.loading.registry.names().steers == {}
    assert serving.post(COMPLETIONS, {"prompt": "x"}, key=None).status == 200


def test_a_file_that_is_too_long_is_not_read(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY, KEY)
    small = fake_server(tmp_path, upload_mib=1)
    body = {"steer_name": "a", "steer_data": "A" * 3_000_000}
    assert small.post(LOAD, body).status == 413
    files_of_request = {"steer": "a", "steer_files": {"a": "A" * 3_000_000}}
    assert small.post(COMPLETIONS, files_of_request).status == 413
    closed = fake_server(tmp_path, upload_mib=0)
    answer = closed.post(LOAD, {"steer_name": "a", "steer_data": encoded(files / "0.safetensors")})
    assert (answer.status, "runtime.upload_mib is 0" in answer.message) == (401, True)


def test_a_request_brings_its_own_steer(serving: FakeServer, files: Path) -> None:
    data = encoded(files / "0.safetensors")
    for value in (data, {"steer_data": data, "default_strength": 3}):
        body = {"prompt": "x", "steer": "mine", "steer_files": {"mine": value}}
        answer = serving.post(COMPLETIONS, body, key=None)
        assert answer.status == 200
        strength = "1" if value is data else "3"
        assert answer.headers["x-steer"].startswith(f"mine:{strength}@")
        (dose,) = serving.doses
        assert serving.plan.steer_of(dose).hidden_size == 6  # type: ignore[union-attr]
        assert serving.got[-1]["prompt"] == "x"
        assert serving.got[-1]["vllm_xargs"] == {"steer": "mine"}
        assert not serving.got[-1].get("steer_files")  # vLLM does not parse the file
    assert serving.loading.registry.names().steers == {}
    assert serving.post(COMPLETIONS, {"steer": "mine"}, key=None).status == 400


def test_a_requests_own_steer_comes_before_a_loaded_one(serving: FakeServer, files: Path) -> None:
    path = str(files / "0.safetensors")
    loaded = serving.post(LOAD, {"steer_name": "a", "steer_path": path})
    body = {"steer": "a:2", "steer_files": {"a": encoded(files / "1.safetensors")}}
    own = serving.post(COMPLETIONS, body).headers["x-steer"]
    again = serving.post(COMPLETIONS, {"steer": "a:2"}).headers["x-steer"]
    assert own != again == f"a:2@{loaded.body['digest'][:12]}"


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"steer_files": {"a": "DATA"}}, 400, "steer_files has a, which steer does not name"),
        ({"steer": "b", "steer_files": {"a": "DATA"}}, 400, "which steer does not name"),
        ({"steer": "a", "steer_files": ["DATA"]}, 400, "expected an object of names and files"),
        ({"steer": "a", "steer_files": {"a": 1}}, 400, "steer_files.a is 1; expected a file"),
        ({"steer": "a", "steer_files": {"a": "AAAA"}}, 422, "neither a safetensors file nor"),
        ({"steer": "a", "steer_files": {"a": {"path": "/x"}}}, 400, "path is not a key here"),
        ({"steer": "a:x", "steer_files": {"a": "DATA"}}, 400, "strength 'x'"),
    ],
)
def test_bad_files_of_a_request_are_refused(
    serving: FakeServer, files: Path, fields: dict[str, Any], status: int, message: str
) -> None:
    text = json.dumps(fields).replace("DATA", encoded(files / "0.safetensors"))
    answer = serving.post(COMPLETIONS, text.encode(), key=None)
    assert answer.status == status
    assert message in answer.message
    assert serving.got == []


def test_a_full_room_refuses_a_requests_steer(serving: FakeServer, files: Path) -> None:
    for name in ("0", "1"):
        body = {"steer_name": name, "steer_path": str(files / f"{name}.safetensors")}
        assert serving.post(LOAD, body).status == 200
    body = {"steer": "mine", "steer_files": {"mine": encoded(files / "2.safetensors")}}
    answer = serving.post(COMPLETIONS, body)
    assert (answer.status, "all of the room is in use" in answer.message) == (409, True)
    same = {"steer": "mine", "steer_files": {"mine": encoded(files / "1.safetensors")}}
    assert serving.post(COMPLETIONS, same).status == 200  # the content is there already


def test_every_answer_says_what_was_applied(serving: FakeServer, files: Path) -> None:
    path = str(files / "0.safetensors")
    digest = serving.post(LOAD, {"steer_name": "a", "steer_path": path}).body["digest"][:12]
    for body, header in (
        ({"prompt": "x"}, "none"),
        ({"steer": "none"}, "none"),
        ({"steer": "a:0"}, "none"),
        ({"steer": "a:1.5"}, f"a:1.5@{digest}"),
        ({"vllm_xargs": {"steer": "a:2e3"}}, f"a:2000@{digest}"),
        ({"steer": {"a": {"strength": "dynamic", "max": 2}}}, f"a:dynamic@{digest}"),
    ):
        assert serving.post(COMPLETIONS, body, key=None).headers["x-steer"] == header
    assert serving.post("/health", b"", method="GET").headers["x-steer"] == "none"
    serving.status = 503
    failed = serving.post(COMPLETIONS, {"steer": "a:1.5"}, key=None)
    assert failed.headers["x-steer"] == "none"
