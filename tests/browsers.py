"""A real browser for tests: Debian's chromium, headless, driven by Playwright."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from cdc_mmpg.device.page import are_installed

REQUIRED = "CDC_MMPG_BROWSER"  # environment variable: fail instead of skipping where there is no browser
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream",
    "--host-resolver-rules=MAP lab.example 127.0.0.1",  # a name that is not localhost, so http is not secure there
]  # fmt: skip
PATIENCE = 60_000  # milliseconds until a wait fails


def require_libraries() -> None:
    """Skip the test where the page's libraries are not installed."""
    if not are_installed():
        refuse_or_skip("the libraries of the page are not installed: make web")


def refuse_or_skip(missing: str) -> None:
    """Skip the test because of what this machine lacks; fail where a browser is required."""
    if os.environ.get(REQUIRED):
        pytest.fail(missing)
    pytest.skip(missing)


@contextmanager
def open_browser() -> Iterator[Any]:
    """Yield a browser; skip the test without one."""
    require_libraries()
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        refuse_or_skip("no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def open_page(context: Any, url: str, bundle: str = "device") -> Any:
    """Open the page and wait until its model is ready, or until it says why it is not."""
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(f"{url}/?bundle={bundle}")
    wait_until_idle(page)
    return page


def wait_until_idle(page: Any) -> None:
    """Wait until no operation of the page runs."""
    page.wait_for_selector('#main[aria-busy="false"]')


def wait_until(page: Any, expression: str) -> None:
    """Wait until an expression is true; Playwright's own function evaluates text, which the page's policy forbids."""
    end = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(100)


def ask(page: Any, clip: Path | None, question: str) -> dict[str, Any]:
    """Choose a clip, if one is given, ask a question as a user does, and return the answer that the page shows."""
    if clip is not None:
        choose(page, clip)
    page.fill("#question", question)
    page.press("#question", "Enter")
    wait_until_idle(page)
    shown: dict[str, Any] = json.loads(page.text_content("#last-answer") or "{}")
    return shown


def choose(page: Any, *clips: Path) -> None:
    """Choose clips instead of those that were chosen before."""
    if page.is_visible("#clear-clips"):
        page.click("#clear-clips")
    page.set_input_files("#files", [str(clip) for clip in clips])


def read_message(page: Any) -> str:
    """Return the sentence in the page's message bar."""
    return str(page.text_content("#message"))
