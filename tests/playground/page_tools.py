"""The page as its user has it: strengths, answers and samples."""

import json
import re
from typing import Any

from playwright.sync_api import Locator, Page, Request, expect

ENDED = re.compile(r", \d+\.\d s$")
ANSWERS = ("v1/completions", "v1/chat/completions")


class Playground:
    """An open page; ``sent`` has the requests for answers in their order."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.sent: list[Request] = []
        page.on("request", self._note)

    def _note(self, request: Request) -> None:
        if request.url.removeprefix(f"{self.url}/") in ANSWERS:
            self.sent.append(request)

    def ready(self) -> "Playground":
        """Wait until the lists of steers and models were read."""
        self.page.locator("#model option").first.wait_for(state="attached")
        self.page.wait_for_load_state("networkidle")
        return self

    def slider(self, steer: str) -> Locator:
        return self.page.get_by_role("slider", name=steer, exact=True)

    def number(self, steer: str) -> Locator:
        return self.page.get_by_label(f"{steer}, as a number", exact=True)

    def dynamic(self, steer: str) -> Locator:
        return self.page.get_by_label(f"Dynamic strength of {steer}", exact=True)

    def set(self, steer: str, strength: float) -> None:
        self.number(steer).fill(str(strength))

    def generate(self) -> None:
        """Press the button and wait for the end of both answers."""
        self.page.get_by_role("button", name="Generate", exact=True).click()
        self.wait()

    def wait(self) -> None:
        expect(self.page.locator(".status").last).to_have_text(ENDED, timeout=60_000)
        expect(self.page.locator(".busy")).to_have_count(0, timeout=60_000)

    def text(self, name: str) -> str:
        """The text of an answer, without the prompt: ``steered`` or ``unsteered``."""
        spans = self.page.locator(f"#{name} .text .token")
        return "".join(spans.all_text_contents())

    def problem(self) -> str:
        return self.page.locator("#problem").text_content() or ""

    def sample(self, tab: str) -> str:
        """The request as the button Copy gives it to the clipboard."""
        self.page.get_by_role("tab", name=tab).click()
        self.page.get_by_role("button", name="Copy", exact=True).click()
        expect(self.page.locator("#copied")).to_have_text("Copied.")
        copied: str = self.page.evaluate("navigator.clipboard.readText()")
        return copied

    def last_sent(self) -> Any:
        """The body of the last steered request."""
        bodies = [json.loads(request.post_data or "") for request in self.sent]
        return [body for body in bodies if body["steer"] != "none"][-1]
