"""The pages of the examples and the console lines of the README, in Chromium against a real server.

The law of this file: what a person would do and see, and nothing else; no function of a page is called from here.
Every wait is Playwright's and has its deadline. A server that must die is killed, a line that must break is cut. The
pictures of the chat are written to pytest's temporary folder for whoever wants to look at them.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from starlette_rt.realtime import STATICS
from tests.line import Line
from tests.readme import first_block, write_app
from tests.servers import Server, serve

pytest.importorskip("playwright")
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Error, Page, Route, expect, sync_playwright

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
GRACE = 20_000  # milliseconds: a presence grace of 10 s and some patience
# A page that a test answers itself comes from nowhere, and from there Chromium lets nobody speak to this machine.
FLAGS = ["--no-sandbox", "--disable-features=LocalNetworkAccessChecks"]
Visit = Callable[..., Page]
expect.set_options(timeout=10_000)  # a busy machine is slow, not wrong


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def visiting(browser: Browser) -> Iterator[Visit]:
    """Open pages, each in a profile of its own; at the end none may have had an uncaught error."""
    contexts = []
    errors: list[str] = []

    def visit(url: str, prepare: Callable[[BrowserContext], None] | None = None, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        if prepare is not None:
            prepare(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    with visiting(browser) as visit:
        yield visit


def serving(folder: Path, app: str = "app:app") -> Any:
    return serve(app, args=["--app-dir", str(folder)])


class Mortal:
    """The chat on one port, killed without a word and started again."""

    def __init__(self) -> None:
        self._running = ExitStack()
        self.server = self._running.enter_context(serving(EXAMPLES / "chat", "tests.mortal:app"))
        self.http = self.server.http

    def kill(self) -> None:
        self.server.stop(signal.SIGKILL)

    def start(self) -> None:
        self._running.close()
        with patch("tests.servers._free_port", lambda: self.server.port):
            self.server = self._running.enter_context(serving(EXAMPLES / "chat", "tests.mortal:app"))

    def revive(self) -> None:
        if not self.server.running:
            self.start()

    def stick(self, number: int) -> None:
        """Let the handler of the n-th message from now never end, once it has been broadcast."""
        request = urllib.request.Request(f"{self.http}/stick/{number}", method="POST")
        urllib.request.urlopen(request, timeout=5).close()

    def end(self) -> None:
        self._running.close()


@pytest.fixture(scope="module")
def mortal() -> Iterator[Mortal]:
    mortal = Mortal()
    yield mortal
    mortal.end()


@pytest.fixture(autouse=True)
def revived(request: pytest.FixtureRequest) -> None:
    """A test that failed while the server was dead takes no other with it."""
    if "mortal" in request.fixturenames:
        mortal: Mortal = request.getfixturevalue("mortal")
        mortal.revive()


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


def heard(page: Page, text: str | re.Pattern[str]) -> Any:
    return page.locator("#log .said", has_text=text)


def back(*pages: Page) -> None:
    """Let pages come back at once, by what a browser says when it has a network again."""
    for page in pages:
        online = "() => { dispatchEvent(new Event('online')); return document.querySelector('#lost').hidden; }"
        page.wait_for_function(online, polling=50, timeout=GRACE)
        expect(page.locator("#state")).to_have_text("Connected")


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
    expect(ada.locator("#log .pending, #log .failed")).to_have_count(0)
    expect(ada.locator("#latency")).to_have_text(re.compile(r"^\d+ ms$"))


def test_all_see_the_messages_of_two_writers_in_one_order(visit: Visit, chat: Server) -> None:
    ada, ben = come_in(visit(chat.http), "Ada"), come_in(visit(chat.http), "Ben")
    for page in (ada, ben):
        enter(page, "Debate")
    for number in range(4):
        say(ada, f"for {number}")
        say(ben, f"against {number}")
    for page in (ada, ben):
        expect(heard(page, re.compile("^(for|against)"))).to_have_count(8)
        expect(page.locator("#log .pending")).to_have_count(0)
    assert ada.locator("#log .said").all_inner_texts() == ben.locator("#log .said").all_inner_texts()


def test_who_enters_sees_what_was_said_before(visit: Visit, chat: Server) -> None:
    ada = come_in(visit(chat.http), "Ada")
    enter(ada, "Library")
    for number in range(3):
        say(ada, f"chapter {number}")
    expect(ada.locator("#log .pending")).to_have_count(0)
    ben = come_in(visit(chat.http), "Ben")
    enter(ben, "Library")
    expect(ben.locator("#log .said")).to_have_text([f"chapter {number}" for number in range(3)])
    expect(ben).to_have_title("Library · Parlour")  # nothing of it counts as unread


def test_typing_is_seen_until_it_is_over(visit: Visit, chat: Server) -> None:
    ada, ben = come_in(visit(chat.http), "Ada"), come_in(visit(chat.http), "Ben")
    for page in (ada, ben):
        enter(page, "Desk")
    typing = ada.locator("#typing")
    expect(typing).to_be_hidden()
    ben.locator("#text").press_sequentially("Let me th")
    expect(typing).to_have_text("Ben is typing")
    expect(ben.locator("#typing")).to_be_hidden()  # who types need not be told
    expect(typing).to_be_hidden()  # the keys rest
    ben.locator("#text").press_sequentially("ink")
    expect(typing).to_have_text("Ben is typing")
    ben.locator("#text").press("Enter")
    expect(typing).to_be_hidden(timeout=2_000)  # it is said, long before the time is over
    expect(heard(ada, "Let me think")).to_be_visible()
    ben.locator("#text").press_sequentially("And")
    expect(typing).to_be_visible()
    ben.context.close()
    expect(typing).to_be_hidden(timeout=2_000)


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
    expect(ada.locator("#log .note")).to_have_text(["Ben joined", "Eve joined", "Eve left"])  # Ben's once
    expect(ben.locator("#log .note")).to_have_text(["Eve left"])


def test_what_is_written_while_the_server_is_down_waits_and_arrives_once(visit: Visit, mortal: Mortal) -> None:
    ada, ben = come_in(visit(mortal.http), "Ada"), come_in(visit(mortal.http), "Ben")
    enter(ada, "Harbour")
    expect(ada.locator("#persons .name")).to_have_text(["Ada"])
    enter(ben, "Harbour")
    say(ada, "Before the storm.")
    expect(heard(ben, "Before the storm.")).to_be_visible()
    expect(ada.locator("#log .pending")).to_have_count(0)
    mortal.kill()
    expect(ada.locator("#lost")).to_be_visible()
    expect(ada.locator("#state")).to_have_text("Reconnecting …")
    say(ada, "Can you hear me?")
    say(ada, "Hello?")
    expect(ada.locator("#log .pending .said")).to_have_text(["Can you hear me?", "Hello?"])
    expect(ada.locator("#log .pending .waits").last).to_have_text("Waits for the connection")
    mortal.start()
    for page in (ada, ben):
        expect(page.locator("#state")).to_have_text("Connected", timeout=30_000)
        expect(page.locator("#lost")).to_be_hidden()
        expect(page.locator("#persons .name")).to_have_text(["Ada", "Ben"] if page == ada else ["Ben", "Ada"])
        expect(page.locator("#log .said")).to_have_text(["Before the storm.", "Can you hear me?", "Hello?"])
        expect(page.locator("#log .pending")).to_have_count(0)
    say(ben, "Loud and clear.")
    expect(heard(ada, "Loud and clear.")).to_be_visible()
    expect(ada.locator("#log .note")).to_have_text(["Ben joined"])  # nobody left: all were away


@pytest.fixture(scope="module")
def couple(browser: Browser, mortal: Mortal) -> Iterator[tuple[Page, Page]]:
    """Two pages that live through one death of the server after the other."""
    mortal.revive()
    with visiting(browser) as visit:
        yield come_in(visit(mortal.http), "Ada"), come_in(visit(mortal.http), "Ben")


@pytest.mark.parametrize("seed", range(20))
def test_a_server_killed_between_five_messages_loses_none_and_doubles_none(
    mortal: Mortal, couple: tuple[Page, Page], seed: int
) -> None:
    ada, ben = couple
    back(ada, ben)
    chance = random.Random(seed)
    texts = [f"run {seed}, message {number}" for number in range(5)]
    if seed % 2:
        die_before_the_answer(mortal, ada, ben, texts, chance.randrange(5))
    else:
        die_at_some_moment(mortal, ada, texts, chance)
    back(*chance.sample([ada, ben], 2))
    for page in (ada, ben):
        expect(heard(page, re.compile(f"^run {seed},"))).to_have_text(texts)
        expect(page.locator("#log .pending, #log .failed")).to_have_count(0)


def die_before_the_answer(mortal: Mortal, ada: Page, ben: Page, texts: list[str], which: int) -> None:
    """Kill the server when one message has been seen by the other page and not been answered."""
    mortal.stick(which + 1)
    for text in texts:
        say(ada, text)
    expect(heard(ben, texts[which])).to_be_visible()
    mortal.kill()
    mortal.start()


def die_at_some_moment(mortal: Mortal, ada: Page, texts: list[str], chance: random.Random) -> None:
    """Write five messages within half a second; in which the server is killed, and some time later started."""
    deeds: list[tuple[float, Callable[[], None]]] = [
        (chance.uniform(0, 0.5), lambda text=text: say(ada, text)) for text in texts
    ]
    moments = sorted(moment for moment, _ in deeds)
    deeds = [(moment, deed) for moment, (_, deed) in zip(moments, deeds, strict=True)]
    death = chance.uniform(0, 0.5)
    deeds += [(death, mortal.kill), (death + chance.uniform(0, 0.2), mortal.start)]
    begin = time.monotonic()
    for moment, deed in sorted(deeds, key=lambda each: each[0]):
        ada.wait_for_timeout(max(0, begin + moment - time.monotonic()) * 1000)
        deed()


def altered(url: str, code: str, instead: str = "") -> Callable[[BrowserContext], None]:
    """Let a page get a script in which one line is another."""

    def alter(route: Route) -> None:
        response = route.fetch()
        script = response.text()
        assert script.count(code) == 1, f"{url} has no such line any more"
        route.fulfill(response=response, body=script.replace(code, instead))

    return lambda context: context.route(url, alter)


NO_CLIENT = altered("**/rt/starlette-rt.js", "if (this._seen.has(id)) return;")
NO_PAGE = altered(
    "**/static/chat.js", "if (where.said.some((item) => item.id === message.id && item.from === message.from)) return;"
)


@pytest.mark.parametrize(
    ("without", "shown"),
    [((), 1), ((NO_PAGE,), 1), ((NO_CLIENT,), 1), ((NO_PAGE, NO_CLIENT), 2)],
    ids=["as-it-is", "by-the-publication-alone", "by-the-page-alone", "by-nothing"],
)
def test_what_is_broadcast_again_shows_once_by_its_name(
    visit: Visit, mortal: Mortal, without: tuple[Any, ...], shown: int
) -> None:
    """Either the client or the page suffices; the last case shows that the message really comes twice."""
    with Line(mortal.server) as line:
        ada = come_in(visit(line.http), "Ada")
        ben = come_in(visit(mortal.http, lambda context: [alter(context) for alter in without]), "Ben")
        for page in (ada, ben):
            enter(page, f"Echo {shown}{len(without)}{int(NO_PAGE in without)}")
        mortal.stick(1)
        say(ada, "Do you hear that?")
        expect(heard(ben, "Do you hear that?")).to_have_count(1)
        line.cut()
        mortal.kill()
        mortal.start()
        back(ben)  # before it is broadcast again
        line.mend()
        back(ada)
        expect(ada.locator("#log .pending")).to_have_count(0)
        say(ada, "That.")
        expect(heard(ben, "That.")).to_be_visible()
        expect(heard(ben, "Do you hear that?")).to_have_count(shown)
        expect(heard(ada, "Do you hear that?")).to_have_count(1)


@pytest.mark.parametrize("page_is", ["elsewhere", "on the server"])
def test_a_reload_in_the_middle_of_an_outage_loses_nothing(visit: Visit, mortal: Mortal, page_is: str) -> None:
    """Neither what was said before, nor what waits, nor what was said and never answered."""
    ada, ben = come_in(visit(mortal.http), "Ada"), come_in(visit(mortal.http), "Ben")
    group, texts = f"Ferry {page_is}", [f"Wave {number}" for number in range(3)]
    for page in (ada, ben):
        enter(page, group)
    say(ada, "All aboard.")
    expect(heard(ben, "All aboard.")).to_be_visible()
    expect(ada.locator("#log .pending")).to_have_count(0)
    mortal.stick(1)
    for text in texts:
        say(ada, text)
    expect(heard(ben, texts[0])).to_be_visible()
    mortal.kill()
    expect(ada.locator("#log .pending .said")).to_have_text(texts[1:])
    if page_is == "elsewhere":
        ada.context.route(re.compile("/(static/.*|rt/.*)?$"), from_elsewhere)
        ada.reload()
        ada.get_by_role("button", name=group).click()
        expect(ada.locator("#log .said")).to_have_text(["All aboard.", *texts])
        expect(ada.locator("#log .pending .said")).to_have_text(texts[1:])
        mortal.start()
    else:
        with pytest.raises(Error, match="ERR_CONNECTION_REFUSED"):
            ada.reload()
        mortal.start()
        ada.goto(mortal.http)
        ada.get_by_role("button", name=group).click()
    back(ada, ben)
    for page in (ada, ben):
        expect(page.locator("#log .said")).to_have_text(["All aboard.", *texts])
        expect(page.locator("#log .pending")).to_have_count(0)


def from_elsewhere(route: Route) -> None:
    """The files of the page, as from a server of its own."""
    folder, _, name = route.request.url.split("/", 3)[3].partition("/")
    file = STATICS / name if folder == "rt" else EXAMPLES / "chat" / "static" / (name or "index.html")
    route.fulfill(path=file)


def test_one_who_writes_too_fast_waits_and_loses_nothing(visit: Visit, chat: Server) -> None:
    ada, ben = come_in(visit(chat.http), "Ada"), come_in(visit(chat.http), "Ben")
    for page in (ada, ben):
        enter(page, "Hurry")
    hurried = (
        "(text) => [...Array(16).keys()].forEach((n) => { text.value = `quick ${n}`; text.form.requestSubmit(); })"
    )
    ada.locator("#text").evaluate(hurried)  # faster than any key could be pressed
    expect(ada.locator("#log .pending .waits").last).to_have_text("Slow down a little; this waits its turn")
    for page in (ada, ben):
        expect(page.locator("#log .said")).to_have_text([f"quick {number}" for number in range(16)])
        expect(page.locator("#log .pending, #log .failed")).to_have_count(0)


def test_what_the_server_refuses_can_be_sent_again(visit: Visit, mortal: Mortal) -> None:
    ada = come_in(
        visit(mortal.http, altered("**/static/chat.js", "text: item.text }", 'text: item.text.replace("!", "") }')),
        "Ada",
    )
    say(ada, "!")  # nothing is left of it
    expect(ada.locator("#log .failed .trouble")).to_contain_text("Not sent")
    ada.get_by_role("button", name="Send again").click()
    expect(ada.locator("#log .failed .trouble")).to_contain_text("Not sent")


def test_who_leaves_takes_all_along(visit: Visit, chat: Server) -> None:
    page = come_in(visit(chat.http), "Ada")
    enter(page, "Diary")
    say(page, "Dear diary")
    expect(page.locator("#log .pending")).to_have_count(0)
    page.get_by_role("button", name="choose another name").click()
    expect(page.get_by_label("Your name")).to_be_focused()
    come_in(page, "Ben")
    expect(page.locator("#groups .name")).to_have_text(["Lobby", "Design", "Engineering"])
    expect(heard(page, "Dear diary")).to_have_count(0)


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


CONNECT = [
    'const { connect } = await import("/rt/starlette-rt.js");',
    'const token = async () => (await fetch("/login/NAME", { method: "POST" })).text();',
    'const rt = connect("/ws", { token });',
    "const heard = [];",
    'rt.group("lobby").on("message", ({ text }) => heard.push(text));',
]


def test_the_app_of_the_readme_with_a_history_recovers_its_group(visit: Visit, tmp_path: Path) -> None:
    """One line of the app is another; our client knows no more of it than that it is joined to the lobby."""
    app = first_block()
    for before, after in [
        ("rt = Realtime()", 'rt = Realtime(history={"lobby": History(100, 300)})'),
        ("import Identity", "import History, Identity"),
    ]:
        assert app.count(before) == 1
        app = app.replace(before, after)
    (tmp_path / "app.py").write_text(app, "utf-8")
    client = lambda context: context.route("**/rt/*", from_elsewhere)  # noqa: E731  # the app does not serve it
    with serving(tmp_path) as server, Line(server) as line:
        ada, ben = visit(line.http, client), visit(server.http, client)
        for page, name in ((ada, "ada"), (ben, "ben")):
            type_into_console(page, [line.replace("NAME", name) for line in CONNECT])
            page.wait_for_function("rt.state === 'open' && rt.group('lobby').joined")

        def emit(*texts: str) -> None:
            for text in texts:
                type_into_console(ben, [f"await rt.emit('message', {json.dumps({'text': text})})"])

        emit("one")
        ada.wait_for_function("heard.length === 1")
        line.cut()
        ada.wait_for_function("rt.state === 'waiting'")
        emit("two", "three", "four")
        line.mend()
        ada.wait_for_function("rt.state === 'open' && rt.group('lobby').joined", timeout=GRACE)
        emit("five")
        ada.wait_for_function("heard.includes('five')")
        assert ada.evaluate("heard") == ["one", "two", "three", "four", "five"]


def test_a_page_with_a_codec_speaks_messagepack_to_one_that_speaks_json(visit: Visit, chat: Server) -> None:
    ada, mona = come_in(visit(chat.http), "Ada"), visit(chat.http)
    enter(ada, "Tower")
    say(ada, "Ça va?")
    expect(ada.locator("#log .pending")).to_have_count(0)
    lines = [line.replace("NAME", "Mona").replace("{ token }", "{ token, codec }") for line in CONNECT[:4]]
    join = 'rt.join("tower", { last: 1 }).on("said", ({ name, text }) => heard.push(`${name}: ${text}`));'
    long = "Très bien! " * 20
    emit = f'await rt.emit("say", {{ id: "m", text: {json.dumps(long)} }}, {{ group: "tower" }});'
    codec = (Path(__file__).parent / "js" / "msgpack.mjs").read_text("utf-8")
    frames: list[str | bytes] = []
    mona.on("websocket", lambda socket: socket.on("framesent", lambda frame: frames.append(frame)))
    type_into_console(mona, [codec.replace("export ", ""), *lines, join, emit])
    expect(heard(ada, long.strip())).to_have_count(1)
    assert mona.evaluate("heard") == ["Ada: Ça va?", f"Mona: {long.strip()}"]
    assert {type(frame) for frame in frames} == {bytes}
