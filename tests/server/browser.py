"""A headless Chromium for tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str:
    """The path of an installed Chromium; skips the test where there is none."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium is installed here (Debian: apt-get install chromium)")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser; while it runs, this thread cannot run an event loop of its own."""
    path = find_chromium()
    with sync_playwright() as playwright:
        # Containers lack what its sandbox and its shared memory need; the pages are our own.
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=path, args=options)
        try:
            yield browser
        finally:
            browser.close()
