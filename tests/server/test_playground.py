"""The playground in a real browser, against a server whose answers the test holds in its hands."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

import fuserve
from tests.loadgen.fake_openai import WAIT_S, FakeOpenAI
from tests.server.browser import chromium
from tests.server.serving import served

FOLDER = Path(fuserve.__file__).parent / "server" / "playground"
DESKTOP, PHONE = (1280, 800), (375, 720)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(static=FOLDER).serving() as server:
        yield server


@pytest.fixture
def page(browser: Browser, fake: FakeOpenAI) -> Iterator[Page]:
    yield from opened(browser, fake, DESKTOP)


@pytest.fixture
def phone(browser: Browser, fake: FakeOpenAI) -> Iterator[Page]:
    yield from opened(browser, fake, PHONE)


def opened(browser: Browser, fake: FakeOpenAI, size: tuple[int, int]) -> Iterator[Page]:
    """The page, which must ask nobody but its server and leave nothing on the console."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    found = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    found.on("request", lambda request: asked.append(request.url))
    found.goto(fake.url)
    yield found
    context.close()
    # A refused request is logged by the browser itself.
    assert [text for text in complaints if "Failed to load resource" not in text] == []
    assert [url for url in asked if not url.startswith((fake.url, "data:"))] == []


def say(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def answers(page: Page) -> Any:
    return page.get_by_role("article", name="Model")


def finished(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_the_page_says_which_model_answers(page: Page) -> None:
    expect(page.get_by_role("status", name="Server")).to_have_text("fake")
    expect(page).to_have_title("fuserve playground")


def test_an_answer_appears_piece_by_piece_with_its_speed(page: Page, fake: FakeOpenAI) -> None:
    second, third = threading.Event(), threading.Event()

    def reply(body: dict[str, Any]) -> Iterator[str]:
        yield "Blue"
        assert second.wait(WAIT_S)
        yield " light"
        assert third.wait(WAIT_S)
        yield " scatters."

    fake.reply = reply
    say(page, "Why is the sky blue?")
    expect(answers(page)).to_have_text("Blue")
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "true")
    second.set()
    expect(answers(page)).to_have_text("Blue light")
    expect(page.locator("#meter")).to_contain_text("tokens/s")
    third.set()
    expect(answers(page)).to_have_text("Blue light scatters.")
    finished(page)
    expect(page.locator("#meter")).to_contain_text("first token")
    expect(page.locator("#meter")).to_contain_text("3 tokens")


def test_the_model_is_told_what_was_said_before(page: Page, fake: FakeOpenAI) -> None:
    say(page, "one")
    finished(page)
    say(page, "two")
    finished(page)
    assert [(m["role"], m["content"]) for m in fake.bodies[-1]["messages"]] == [
        ("user", "one"),
        ("assistant", fake_answer(fake.bodies[0])),
        ("user", "two"),
    ]


def fake_answer(body: dict[str, Any]) -> str:
    return "".join(f" word{i}" for i in range(body["max_tokens"]))


def test_a_new_chat_forgets(page: Page, fake: FakeOpenAI) -> None:
    say(page, "one")
    finished(page)
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("heading", name="Ask the model")).to_be_visible()
    say(page, "two")
    finished(page)
    assert len(fake.bodies[-1]["messages"]) == 1


def endless(body: dict[str, Any]) -> Iterator[str]:
    pause = threading.Event()
    while not pause.wait(0.005):
        yield "on and "


@pytest.mark.parametrize("way", ["button", "key"])
def test_stopping_ends_the_request_and_keeps_what_came(
    page: Page, fake: FakeOpenAI, way: str
) -> None:
    fake.reply = endless
    say(page, "Go on for ever.")
    expect(answers(page)).to_contain_text("on and on")
    if way == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    assert fake.disconnected.wait(WAIT_S)
    finished(page)
    expect(answers(page)).to_contain_text("stopped")
    fake.reply = lambda body: iter(["ok"])
    say(page, "Thanks.")
    finished(page)
    assert fake.bodies[-1]["messages"][1]["content"].startswith("on and on and")


def test_a_new_chat_in_the_middle_of_an_answer_ends_it(page: Page, fake: FakeOpenAI) -> None:
    fake.reply = endless
    say(page, "Go on for ever.")
    expect(answers(page)).to_contain_text("on and on")
    page.get_by_role("button", name="New chat").click()
    assert fake.disconnected.wait(WAIT_S)
    expect(answers(page)).to_have_count(0)
    expect(page.locator("#meter")).to_have_text("")


def test_nothing_is_asked_for_that_the_user_did_not_choose(page: Page, fake: FakeOpenAI) -> None:
    say(page, "hello")
    finished(page)
    body = fake.bodies[-1]
    assert set(body) == {"model", "messages", "max_tokens", "stream", "stream_options"}
    assert (body["model"], body["stream_options"]) == ("fake", {"include_usage": True})


def test_the_settings_are_sent_kept_over_a_reload_and_reset(page: Page, fake: FakeOpenAI) -> None:
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Max tokens").fill("7")
    page.get_by_label("Seed", exact=True).fill("42")
    page.reload()
    say(page, "hello")
    finished(page)
    body = fake.bodies[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    chosen = {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed")}
    assert chosen == {"temperature": 0.3, "top_p": 0.9, "max_tokens": 7, "seed": 42}

    page.get_by_role("button", name="Reset to defaults").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("")
    say(page, "hello again")
    finished(page)
    assert "temperature" not in fake.bodies[-1] and "seed" not in fake.bodies[-1]


def test_what_a_model_writes_is_never_html(page: Page, fake: FakeOpenAI) -> None:
    hostile = (
        '<img src=x onerror="window.hacked=1"> <script>window.hacked=1</script>\n\n'
        "[click](javascript:window.hacked=1) **<b onclick=1>bold</b>**\n"
        '```"><svg onload=window.hacked=1>\n<iframe src=javascript:1></iframe>\n```\n'
    )
    fake.reply = lambda body: iter([hostile])
    say(page, "<u>me too</u>")
    finished(page)
    expect(answers(page)).to_contain_text('<img src=x onerror="window.hacked=1">')
    expect(answers(page)).to_contain_text("[click](javascript:window.hacked=1)")
    expect(answers(page).locator("strong")).to_have_text("<b onclick=1>bold</b>")
    expect(page.get_by_role("article", name="You")).to_have_text("<u>me too</u>")
    strangers = page.locator("#log :is(img, script, svg, iframe, b, u, a)")
    expect(strangers).to_have_count(0)
    assert page.evaluate("window.hacked") is None


def test_simple_markdown_is_laid_out(page: Page, fake: FakeOpenAI) -> None:
    text = (
        "## Title\nSome *soft* and **strong** `code`, 2 * 3 * 4.\n- a\n- b\n\n3. c\n4. d\n"
        "```python\nif x < 1:\n    pass\n```\nSee [docs](https://example.org/a)."
    )
    fake.reply = lambda body: iter(text[i : i + 5] for i in range(0, len(text), 5))
    say(page, "show me")
    finished(page)
    answer = answers(page)
    expect(answer.locator("h4")).to_have_text("Title")
    expect(answer.locator("em")).to_have_text("soft")
    expect(answer.locator("strong")).to_have_text("strong")
    expect(answer.locator("p").first).to_contain_text("2 * 3 * 4")
    expect(answer.locator("ul > li")).to_have_text(["a", "b"])
    expect(answer.locator("ol > li")).to_have_text(["c", "d"])
    expect(answer.locator("ol")).to_have_attribute("start", "3")
    expect(answer.locator("pre")).to_have_text("if x < 1:\n    pass")
    expect(answer.get_by_role("link", name="docs")).to_have_attribute("rel", "noopener noreferrer")


def test_an_error_of_the_api_is_shown_and_can_be_tried_again(page: Page, fake: FakeOpenAI) -> None:
    fake.refuse = lambda body: (429, "The queue is full.")
    say(page, "hello")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The queue is full.")
    expect(alert).to_contain_text("status 429")
    fake.refuse = lambda body: None
    page.get_by_role("button", name="Try again").click()
    expect(alert).to_have_count(0)
    expect(answers(page)).to_contain_text("word0")
    finished(page)
    assert [m["content"] for m in fake.bodies[-1]["messages"]] == ["hello"]


def test_an_error_in_the_middle_of_a_stream_is_shown_beside_what_came(
    page: Page, fake: FakeOpenAI
) -> None:
    fake.reply = lambda body: iter(["Half an"])
    fake.fails_in_stream = "The model's step failed."
    say(page, "hello")
    expect(page.get_by_role("alert")).to_contain_text("The model's step failed.")
    expect(answers(page)).to_contain_text("Half an")


def test_a_server_that_is_gone_is_told(page: Page, fake: FakeOpenAI) -> None:
    expect(page.get_by_role("status", name="Server")).to_have_text("fake")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "hello")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")


def test_a_key_is_asked_for_sent_and_not_kept_beyond_the_tab(
    browser: Browser, fake: FakeOpenAI
) -> None:
    fake.api_key = "sesame"
    for page in opened(browser, fake, DESKTOP):
        expect(page.get_by_role("status", name="Server")).to_have_text("needs an API key")
        key = page.get_by_label("API key", exact=True)
        expect(key).to_be_focused()
        key.fill("sesame")
        key.press("Tab")
        expect(page.get_by_role("status", name="Server")).to_have_text("fake")
        say(page, "hello")
        finished(page)
        assert fake.headers[-1]["authorization"] == "Bearer sesame"
        assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")


def test_everything_can_be_done_with_the_keyboard(page: Page, fake: FakeOpenAI) -> None:
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Enter")
    finished(page)
    expect(answers(page)).to_have_count(1)
    assert fake.bodies[-1]["messages"][-1]["content"] == "first line\nsecond line"
    expect(page.get_by_label("Message", exact=True)).to_have_value("")


@pytest.mark.parametrize("system", ["light", "dark"])
def test_the_theme_follows_the_system_until_the_user_chooses(page: Page, system: Any) -> None:
    def is_dark() -> bool:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return int(colour.removeprefix("rgb(").split(",")[0]) < 128

    page.emulate_media(color_scheme=system)
    assert is_dark() == (system == "dark")
    theme = page.get_by_role("button", name="Theme")
    theme.click()
    assert not is_dark()
    theme.click()
    assert is_dark()
    page.reload()
    assert is_dark()
    expect(theme).to_have_accessible_name("Theme: dark")


@pytest.mark.parametrize("system", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(page: Page, fake: FakeOpenAI, system: Any) -> None:
    page.emulate_media(color_scheme=system)
    fake.refuse = lambda body: (500, "no")
    say(page, "hello")
    places = [
        "#model",
        "#meter",
        ".user",
        ".error .message",
        "aside label",
        ".pair output",
        "#send",
    ]
    for place in places:
        assert page.locator(place).first.evaluate(CONTRAST) >= 4.5, place


CONTRAST = """(element) => {
  const parse = (colour) => colour.match(/[0-9.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b]
    .map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let behind = element;
  while (parse(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const [a, b] = [
    light(parse(getComputedStyle(element).color)),
    light(parse(getComputedStyle(behind).backgroundColor)),
  ].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""


def test_every_control_has_a_name(page: Page) -> None:
    controls = page.locator("button, input, textarea").filter(visible=True)
    for control in controls.all():
        expect(control).to_have_accessible_name(re.compile(".+"))


def test_a_phone_shows_it_all_without_scrolling_sideways(phone: Page, fake: FakeOpenAI) -> None:
    fake.reply = lambda body: iter(["word" * 60, "\n```\n" + "x" * 300 + "\n```"])
    say(phone, "u" * 200)
    finished(phone)
    assert phone.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    expect(phone.get_by_role("button", name="Send")).to_be_in_viewport(ratio=1)
    settings = phone.get_by_role("button", name="Settings")
    expect(phone.get_by_label("Temperature")).to_be_hidden()
    settings.click()
    expect(phone.get_by_label("Temperature")).to_be_in_viewport(ratio=1)
    expect(settings).to_have_attribute("aria-expanded", "true")
    phone.keyboard.press("Escape")
    expect(phone.get_by_label("Temperature")).to_be_hidden()
    expect(settings).to_be_focused()


def test_the_servers_own_page_talks_to_its_model(browser: Browser) -> None:
    with served() as (_, url):
        context = browser.new_context()
        page = context.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        expect(page.get_by_role("status", name="Server")).to_have_text("demo")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Max tokens").fill("24")
        say(page, "What is the capital of France?")
        finished(page)
        expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+ \w+"))
        expect(page.locator("#meter")).to_contain_text("tokens/s")
        say(page, "Count from one to a thousand.")
        page.get_by_role("button", name="Stop").click()
        finished(page)
        assert {address.removeprefix(url).partition("/")[0] for address in asked} == {""}
        context.close()
