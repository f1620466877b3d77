"""Steer files that the page loads into a running server."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from page_tools import Playground
from playwright.sync_api import expect
from server_process import serving

from vllm_steer import embedded
from vllm_steer.embedded import lexicon
from vllm_steer.environment import API_KEY

pytestmark = pytest.mark.matrix
Open = Callable[..., Playground]
KEY = "the key of changes"
CONFIG = {
    "steers": {"formality": {"path": str(embedded.STEERS / "formality.safetensors")}},
    "runtime": {"enabled": True, "room": {"lm_steers": 2, "max_rank": 64, "vectors": 0}},
    "playground": True,
}


@pytest.fixture(scope="module")
def server_url(chromium: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that has one steer and room for others."""
    folder = tmp_path_factory.mktemp("loading")
    config = folder / "steers.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    options = [f"--steer-config={config}", "--served-model-name=embedded"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(API_KEY, KEY)
        with serving(folder / "serve.log", options) as url:
            yield url


def choose(playground: Playground, path: Path) -> None:
    with playground.page.expect_file_chooser() as chooser:
        playground.page.get_by_role("button", name="Choose a file").click()
    chooser.value.set_files(path)


@pytest.mark.expects_errors
def test_a_file_is_loaded_steers_an_answer_and_is_unloaded(open_page: Open, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes((embedded.STEERS / "french.safetensors").read_bytes())
    playground = open_page("#prompt=Hotel+Astoria:&api=completion&max_tokens=40").ready()
    alert = playground.page.get_by_role("alert")

    choose(playground, path)
    expect(alert).to_contain_text("changes need the header 'Authorization: Bearer KEY'")
    playground.page.get_by_label("Key for changes").fill(KEY)
    choose(playground, path)
    expect(playground.slider("mine")).to_be_visible()
    expect(alert).to_be_empty()

    playground.set("mine", 5)
    playground.generate()
    assert lexicon.language(playground.text("steered")) == "fr"
    assert lexicon.language(playground.text("unsteered")) == "en"
    header = playground.page.locator("#steered .steer-header")
    assert (header.text_content() or "").startswith("X-Steer: mine:5@")

    choose(playground, path)
    expect(alert).to_contain_text("mine")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no steer")
    choose(playground, broken)
    expect(playground.page.locator("#load-status")).to_be_empty()
    assert playground.slider("broken").count() == 0
    assert playground.number("mine").input_value() == "5"

    playground.page.get_by_role("button", name="Unload mine").click()
    expect(playground.slider("mine")).to_have_count(0)
    assert playground.page.get_by_role("button", name="Unload formality").count() == 0
    assert "mine" not in playground.page.url
