"""The pages of the examples and the console lines of the README, in Chromium against a real server.

The law of this file: what a person would do and see, and nothing else; no function of a page is called from here.
Every wait is Playwright's and has its deadline. The pictures of the chat are written to pytest's temporary folder
for whoever wants to look at them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.readme import first_block, write_app
from tests.servers import Server, serve

pytest.importorskip("playwright")
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
GRACE = 20_000  # milliseconds: a presence grace of 10 s and some patience
Visit = Callable[..., Page]
expect.set_options(timeout=10_000)  # a busy machine is slow, not wrong


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Open a page in a profile of its own; at the end no page may have had an uncaught error."""
    contexts = []
    errors: list[str] = []

    def visit(url: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert errors == []


def serving(folder: Path) -> Any:
    return serve("app:app", args=["--app-dir", str(folder)])


@pytest.fixture(scope="module")
def chat() -> Iterator[Server]:
    with serving(EXAMPLES / "chat") as server:
        yield server


def come_in(page: Page, name: str) -> Page:
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Come in").click()
    expect(page.locator("#state")).to_have_text("Connected")
    return page


def say(page: Page, text: str) -> None:
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")


def heard(page: Page, text: str) -> Any:
    return page.locator("#log .said", has_text=text)


def enter(page: Page, group: str) -> None:
    page.get_by_label("Enter or begin a group").fill(group)
    page.get_by_label("Enter or begin a group").press("Enter")
    expect(page.locator("#title")).to_have_text(group)


def test_two_pages_chat_with_each_other(visit: Visit, chat: Server) -> None:
    ada, ben = come_in(visit(chat.http), "Ada"), come_in(visit(chat.http), "Ben")
    say(ada, "Good morning, Ben.")
    expect(heard(ben, "Good morning, Ben.")).to_have_count(1)
    say(ben, "Good morning!")
    expect(heard(ada, "Good morning!")).to_have_count(1)
    expect(ada.locator("#log .own .said")).to_have_text(["Good morning, Ben."])


def test_what_is_said_elsewhere_is_counted_until_one_looks(visit: Visit, chat: Server) -> None:
    ada, ben = come_in(visit(chat.http), "Ada"), come_in(visit(chat.http), "Ben")
    for page in (ada, ben):
        enter(page, "Quiet corner")
    ben.get_by_role("button", name="Lobby").click()
    say(ada, "One.")
    say(ada, "Two.")
    expect(ben.locator("[data-group=quiet-corner] .badge")).to_have_text("2")
    expect(ben).to_have_title("(2) Lobby · Parlour")
    ben.keyboard.press("Alt+ArrowUp")  # the last group of the list
    expect(heard(ben, "Two.")).to_be_visible()
    expect(ben.locator(".badge")).to_have_count(0)
    expect(ben).to_have_title("Quiet corner · Parlour")


def test_who_comes_and_who_leaves_is_seen(visit: Visit, chat: Server) -> None:
    ada, ben = come_in(visit(chat.http), "Ada"), come_in(visit(chat.http), "Ben")
    enter(ada, "Garden")
    expect(ada.locator("#alone")).to_be_visible()
    enter(ben, "Garden")
    expect(ada.locator("#log .note")).to_have_text(["Ben joined"])
    expect(ada.locator("#persons .name")).to_have_text(["Ada", "Ben"])
    ben.get_by_role("button", name="Leave group").click()
    expect(ada.locator("#log .note")).to_have_text(["Ben joined", "Ben left"])
    expect(ada.locator("#persons .name")).to_have_text(["Ada"])


def test_a_closed_window_leaves_after_the_grace_and_a_reload_does_not(visit: Visit, chat: Server) -> None:
    ada, ben, eve = (come_in(visit(chat.http), name) for name in ("Ada", "Ben", "Eve"))
    for page in (ada, ben, eve):
        enter(page, "Porch")
    expect(ada.locator("#persons .name")).to_have_text(["Ada", "Ben", "Eve"])
    ben.reload()
    expect(ben.locator("#state")).to_have_text("Connected")
    eve.context.close()
    expect(ada.locator("#persons .name")).to_have_text(["Ada", "Ben"], timeout=GRACE)
    expect(ada.locator("#log .note", has_text="left")).to_have_text(["Eve left"])


def test_the_page_comes_back_after_the_server_restarts(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(EXAMPLES / "chat") as server:
        ada, ben = come_in(visit(server.http), "Ada"), come_in(visit(server.http), "Ben")
        enter(ada, "Harbour")
        enter(ben, "Harbour")
        server.stop()
        expect(ada.locator("#lost")).to_be_visible()
        say(ada, "Can you hear me?")
        expect(ada.locator("#text")).to_have_value("Can you hear me?")  # nothing is lost that was typed
    monkeypatch.setattr("tests.servers._free_port", lambda: server.port)
    with serving(EXAMPLES / "chat"):
        for page in (ada, ben):
            expect(page.locator("#state")).to_have_text("Connected", timeout=30_000)
            expect(page.locator("#lost")).to_be_hidden()
        expect(ada.locator("#persons .name")).to_have_text(["Ada", "Ben"])
        ada.locator("#text").press("Enter")
        expect(heard(ben, "Can you hear me?")).to_be_visible()


def test_one_who_writes_too_fast_is_told_to_wait_and_may_send_again(visit: Visit, chat: Server) -> None:
    ada = come_in(visit(chat.http), "Ada")
    enter(ada, "Hurry")
    hurried = (
        "(text) => [...Array(12).keys()].forEach((n) => { text.value = `quick ${n}`; text.form.requestSubmit(); })"
    )
    ada.locator("#text").evaluate(hurried)  # faster than any key could be pressed
    trouble = ada.locator("#log .trouble").first
    expect(trouble).to_have_text(re.compile("^Slow down"))
    refused = ada.locator("#log .failed").first
    text = refused.locator(".said").inner_text()
    refused.get_by_role("button", name="Send again").click()
    expect(ada.locator("#log .sent .said", has_text=text)).to_be_visible()


def test_who_has_scrolled_up_is_told_of_news_and_left_where_they_read(visit: Visit, chat: Server) -> None:
    ada, ben = come_in(visit(chat.http), "Ada"), come_in(visit(chat.http), "Ben")
    for page in (ada, ben):
        enter(page, "Archive")
    say(ada, "\n".join(f"line {number}" for number in range(60)))
    expect(heard(ben, "line 59")).to_be_visible()
    ben.locator("#scroll").evaluate("element => element.scrollTo(0, 0)")
    say(ada, "News!")
    news = ben.get_by_role("button", name="1 new message")
    expect(news).to_be_visible()
    expect(heard(ben, "News!")).not_to_be_in_viewport()
    news.click()
    expect(heard(ben, "News!")).to_be_in_viewport()
    expect(news).to_be_hidden()
    ben.set_viewport_size({"width": 1280, "height": 400})
    expect(heard(ben, "News!")).to_be_in_viewport()  # whoever reads the newest line keeps seeing it


def test_what_people_write_stays_text(visit: Visit, chat: Server) -> None:
    ada = come_in(visit(chat.http), "Ada")
    say(ada, "<img src=x onerror=\"document.title='owned'\"> <b>bold</b>")
    expect(heard(ada, "<b>bold</b>")).to_be_visible()
    assert ada.locator("#log img, #log b").count() == 0
    assert "owned" not in ada.title()


def test_a_name_that_the_server_refuses_is_explained(visit: Visit, chat: Server) -> None:
    page = visit(chat.http)
    page.get_by_label("Your name").fill("<Ada>")
    page.get_by_role("button", name="Come in").click()
    expect(page.locator("#login-error")).to_contain_text("A name has 1 to 32 letters")
    expect(page.get_by_label("Your name")).to_be_focused()


def test_the_drawers_of_a_phone_open_and_close_by_keyboard(visit: Visit, chat: Server) -> None:
    page = come_in(visit(chat.http, viewport={"width": 390, "height": 780}), "Ada")
    for opener, drawer in (("#show-rail", "#rail"), ("#show-people", "#people")):
        expect(page.locator(drawer)).to_be_hidden()
        page.locator(opener).focus()
        page.keyboard.press("Enter")
        expect(page.locator(drawer)).to_be_visible()
        expect(page.locator(f"{drawer} [data-close]")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.locator(drawer)).to_be_hidden()
        expect(page.locator(opener)).to_be_focused()


def test_light_dark_and_phone_fit_their_windows(visit: Visit, chat: Server, tmp_path: Path) -> None:
    desk, phone = {"width": 1280, "height": 800}, {"width": 390, "height": 780}
    ada = come_in(visit(chat.http, viewport=desk, color_scheme="light"), "Ada Lovelace")
    ben = come_in(visit(chat.http, viewport=desk, color_scheme="dark"), "Ben")
    zoe = come_in(visit(chat.http, viewport=phone, has_touch=True, reduced_motion="reduce"), "Zoë Brontë")
    pages = {"light": ada, "dark": ben, "phone": zoe}
    zoe.locator("#show-rail").click()
    for page in pages.values():
        enter(page, "Terrace")
    expect(ada.locator("#persons .name")).to_have_text(["Ada Lovelace", "Ben", "Zoë Brontë"])
    say(ada, "Good morning. The plan for Thursday is on the board; please read the second half before we meet.")
    expect(heard(ben, "Good morning.")).to_be_visible()
    say(ben, "Read it. I like where the third sketch goes.")
    expect(heard(zoe, "third sketch")).to_be_visible()
    say(zoe, "https://example.org/" + "averylongword" * 12)
    for name, page in pages.items():
        expect(heard(page, "averylongword")).to_be_visible()
        page.screenshot(path=tmp_path / f"{name}.png")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    zoe.locator("#show-rail").click()
    expect(zoe.locator("#rail")).to_be_visible()
    zoe.screenshot(path=tmp_path / "drawer.png")


def test_the_choice_of_light_or_dark_is_kept(visit: Visit, chat: Server) -> None:
    page = come_in(visit(chat.http, color_scheme="light"), "Ada")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.locator("#theme").click()
    dark = page.evaluate(background)
    page.reload()
    assert light != dark == page.evaluate(background)


def test_a_pointer_is_seen_on_the_other_page_until_it_leaves(visit: Visit) -> None:
    with serving(EXAMPLES / "cursors") as server:
        one, other = visit(f"{server.http}/#test"), visit(f"{server.http}/#test")
        for page in (one, other):
            expect(page.locator("#state")).to_contain_text("on the board “test”")
        one.mouse.move(200, 150)
        expect(other.locator(".pointer")).to_have_count(1)
        expect(one.locator(".pointer")).to_have_count(0)
        one.context.close()
        expect(other.locator(".pointer")).to_have_count(0)


def type_into_console(page: Page, lines: list[str]) -> None:
    """Run lines as the console does: one after the other, `await` at the top, and what is declared stays."""
    session = page.context.new_cdp_session(page)
    for line in lines:
        parameters = {"expression": line, "replMode": True, "awaitPromise": True, "userGesture": True}
        answer = session.send("Runtime.evaluate", parameters)
        assert "exceptionDetails" not in answer, answer


def is_hello(message: ConsoleMessage) -> bool:
    return message.text == '{"from":"ada","text":"hello"}'


def test_the_readme_typed_literally_ends_with_two_consoles_seeing_one_message(visit: Visit, tmp_path: Path) -> None:
    with serving(write_app(tmp_path)) as server:
        lines = first_block("js").replace("localhost:8000", f"localhost:{server.port}").splitlines()
        pages = [visit(f"http://localhost:{server.port}/") for _ in range(2)]
        for page, name in zip(pages, ("ada", "ben"), strict=True):
            page.on("dialog", lambda dialog, name=name: dialog.accept(name))
            type_into_console(page, lines[:-1])
            page.wait_for_function("ws.readyState === WebSocket.OPEN")
        with pages[0].expect_console_message(is_hello), pages[1].expect_console_message(is_hello):
            type_into_console(pages[0], lines[-1:])
