"""A served embedded model, and its page in a headless Chromium."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

sys.path.append(str(Path(__file__).parents[1] / "http"))
from page_tools import Playground
from server_process import serving

from vllm_steer import embedded

BROWSERS = (Path("/usr/bin/chromium"), Path("/usr/bin/google-chrome"))
MODEL = "embedded"
DESKTOP = {"width": 1280, "height": 860}


@pytest.fixture(scope="session")
def chromium() -> Path:
    """The browser; the tests are skipped without one, except in continuous integration."""
    for path in BROWSERS:
        if path.exists():
            return path
    reason = f"no {' or '.join(map(str, BROWSERS))}; scripts/install_chromium.sh installs one"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser(chromium: Path) -> Iterator[Browser]:
    """A headless browser. It ends with the module: its event loop would be in others' way."""
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(chromium), args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def server_url(chromium: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the embedded model and its steers."""
    log = tmp_path_factory.mktemp("server") / "serve.log"
    options = [f"--steer-config={embedded.STEER_CONFIG}", f"--served-model-name={MODEL}"]
    with serving(log, options) as url:
        yield url


@pytest.fixture
def open_page(
    browser: Browser, server_url: str, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Playground]]:
    """Opens the page, in a browser without any history.

    Afterwards no request may have left the server and nothing may have been logged as an error;
    the marker ``expects_errors`` allows failed responses.
    """
    contexts: list[BrowserContext] = []
    addresses: list[str] = []
    problems: list[str] = []

    def open_one(
        fragment: str = "",
        *,
        viewport: dict[str, int] | None = None,
        prepare: Callable[[Page], None] | None = None,
        **options: Any,
    ) -> Playground:
        context = browser.new_context(viewport=viewport or DESKTOP, **options)
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda sent: addresses.append(sent.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda said: problems.append(said.text) if said.type in ("error", "warning") else None,
        )
        if prepare is not None:
            prepare(page)
        page.goto(f"{server_url}/steer{fragment}")
        return Playground(page, server_url)

    yield open_one
    for context in contexts:
        context.close()
    elsewhere = [url for url in addresses if not url.startswith((f"{server_url}/", "data:"))]
    assert elsewhere == []
    if request.node.get_closest_marker("expects_errors"):
        problems = [text for text in problems if not re.search("Failed to load resource", text)]
    assert problems == []
