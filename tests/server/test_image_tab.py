"""The playground's image tab in a real browser, against the real server and a held model."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from fuserve.diffusion.image_params import ImageParams
from fuserve.diffusion.pipeline import ImageTask
from tests.engine.images.fake_model import FakeImageModel, Gate
from tests.loadgen.fake_openai import FakeOpenAI
from tests.server.browser import chromium
from tests.server.imaging import ImageServer, pixels, serving_images
from tests.server.test_playground import FOLDER


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@contextmanager
def opened(browser: Browser, url: str, width: int = 1280) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": width, "height": 800})
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    page.goto(url)
    yield page
    context.close()
    assert [text for text in complaints if "Failed to load resource" not in text] == []


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def server(gate: Gate) -> Iterator[ImageServer]:
    with serving_images(FakeImageModel(gate)) as running:
        yield running
        gate.open()


def status(page: Page) -> object:
    return page.get_by_role("status", name="Picture")


def paint(page: Page, prompt: str = "a red circle") -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Paint").click()


def shown(page: Page) -> np.ndarray:
    source = page.locator("#picture").get_attribute("src") or ""
    return pixels(source.removeprefix("data:image/png;base64,"))


def test_a_picture_comes_step_by_step_and_can_be_saved(
    browser: Browser, server: ImageServer, gate: Gate, tmp_path: Path
) -> None:
    with opened(browser, server.url) as page:
        expect(page.get_by_role("status", name="Server")).to_have_text("painter")
        page.get_by_label("Negative prompt").fill("blur")
        page.get_by_label("Steps").fill("4")
        page.get_by_label("Width").fill("96")
        page.get_by_label("Height").fill("64")
        page.get_by_label("Image seed").fill("7")
        page.get_by_label("Guidance").fill("5")
        paint(page)
        expect(status(page)).to_have_text("waiting for the first step…")
        gate.allowed.release(2)
        expect(status(page)).to_have_text("step 2 of 4")
        assert shown(page).shape == (8, 12, 3)
        bar = page.get_by_role("progressbar", name="Progress")
        expect(bar).to_be_visible()
        assert bar.evaluate("bar => bar.value / bar.max") == 0.5
        gate.open()
        expect(status(page)).to_have_text(re.compile(r"4 steps in \d+\.\d s · seed 7"))
        expect(bar).to_be_hidden()
        params = ImageParams(
            negative_prompt="blur", steps=4, width=96, height=64, guidance_scale=5.0
        )
        (image,) = ImageTask(FakeImageModel(), ["a red circle"], [7], params).run()
        assert np.array_equal(shown(page), (image * 255 + 0.5).astype(np.uint8))
        with page.expect_download() as download:
            page.get_by_role("link", name="Save").click()
        assert download.value.suggested_filename == "fuserve-7.png"
        download.value.save_as(tmp_path / "saved.png")
        saved = base64.b64encode((tmp_path / "saved.png").read_bytes()).decode()
        assert np.array_equal(pixels(saved), shown(page))


@pytest.mark.parametrize("way", ["button", "key"])
def test_cancelling_ends_the_request(
    browser: Browser, server: ImageServer, gate: Gate, way: str
) -> None:
    with opened(browser, server.url) as page:
        paint(page)
        gate.wait_for_step()
        if way == "button":
            page.get_by_role("button", name="Cancel").click()
        else:
            page.keyboard.press("Escape")
        expect(status(page)).to_have_text("cancelled")
        expect(page.get_by_role("button", name="Paint")).to_be_visible()
        while not server.engine._thread._aborts:
            page.wait_for_timeout(5)
        gate.open()
        while server.engine.stats().num_running:
            page.wait_for_timeout(5)
        assert len(gate.steps) == 1


def test_what_the_server_refuses_is_told_and_settings_outlast_a_reload(
    browser: Browser, server: ImageServer
) -> None:
    with opened(browser, server.url) as page:
        page.get_by_label("Width").fill("60")
        page.get_by_label("Height").fill("64")
        paint(page)
        expect(status(page)).to_contain_text("width=60 must be a multiple of 8")
        page.reload()
        expect(page.get_by_label("Width")).to_have_value("60")
        expect(page.get_by_label("Prompt", exact=True)).to_have_value("a red circle")


def test_a_server_without_an_image_model_shows_no_tabs(browser: Browser) -> None:
    fake = FakeOpenAI(static=FOLDER)
    with fake.serving(), opened(browser, fake.url) as page:
        expect(page.get_by_role("status", name="Server")).to_have_text("fake")
        expect(page.get_by_role("tablist")).to_be_hidden()


def test_a_phone_shows_the_image_tab_without_scrolling_sideways(
    browser: Browser, server: ImageServer, gate: Gate
) -> None:
    gate.open()
    with opened(browser, server.url, width=375) as page:
        page.get_by_label("Width").fill("512")
        page.get_by_label("Height").fill("512")
        paint(page)
        expect(status(page)).to_contain_text("steps in")
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        for control in page.locator("button, input, textarea, a").filter(visible=True).all():
            expect(control).to_have_accessible_name(re.compile(".+"))
