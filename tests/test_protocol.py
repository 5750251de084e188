"""The page that is the specification and the code that speaks it: every example is read and said again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec
import pytest

from starlette_rt import frames
from starlette_rt.exceptions import CloseCode, ProtocolError
from starlette_rt.protocols import bounds, plain, v1
from starlette_rt.protocols.v1 import V1, V1S, Malformed

pytestmark = pytest.mark.unit

PAGE = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text("utf-8")
CLIENT, SERVER = "What the client says", "What the server says"
CAN_PASS = {"rate_limited", "busy", "skipped", "unavailable"}  # codes of errors after which one tries again
DROPPED = 1006  # what a client sees where nobody closed

TYPES: dict[str, dict[str, type]] = {
    CLIENT: {frame.__struct_config__.tag: frame for frame in get_args(frames.ClientFrame)},
    SERVER: {
        frame.__struct_config__.tag: frame
        for frame in get_args(frames.ServerFrame)
        if issubclass(frame, msgspec.Struct) and frame is not frames.Skip
    },
}


class Example(NamedTuple):
    """One block of JSON: who says it, under which headline, and its text."""

    side: str
    headline: str
    text: str


def examples(page: str) -> Iterator[Example]:
    for side in (CLIENT, SERVER):
        section = re.search(rf"^## {side}$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        for part in re.split(r"^### ", section[1], flags=re.MULTILINE)[1:] if section else ():
            headline, _, text = part.partition("\n")
            for block in re.findall(r"^```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
                yield Example(side, headline, block)


def kind_of(example: Example, value: Any) -> type | None:
    """The type of frame that a value on the page must become."""
    if example.side == SERVER and value["type"] == "event":
        return frames.Skip if "skip" in value else frames.Event
    return TYPES[example.side].get(value["type"])


def spoken(example: Example, protocol: V1, raw: str | bytes) -> tuple[Any, str | bytes]:
    """The frame that one role reads, and how the other says it."""
    if example.side == CLIENT:
        (frame,) = protocol.decode(raw)
        assert not isinstance(frame, Malformed), frame.error
        return frame, protocol.encode_client(frame)
    (heard,) = protocol.decode_server(raw)
    if is_recovery(json.loads(example.text)):
        assert isinstance(heard, frames.Reply)
        heard = protocol.recovery(heard)
    return heard, protocol.encode(heard)


def is_recovery(value: Any) -> bool:
    return value["type"] == "reply" and "recovered" in value["data"]


def complaint(example: Example) -> str | None:
    """What is wrong with an example, if anything is."""
    try:
        value = json.loads(example.text)
        for name, raw, read in (
            ("rt.v1.json", example.text, json.loads),
            ("rt.v1.msgpack", msgspec.msgpack.encode(value), msgspec.msgpack.decode),
        ):
            frame, said = spoken(example, V1S[name], raw)
            kind = frames.Recovery if example.side == SERVER and is_recovery(value) else kind_of(example, value)
            if type(frame) is not kind:
                return f"it becomes a {type(frame).__name__}"
            if read(said) != value:
                return f"{name} says it as {read(said)}"
    except (ValueError, LookupError, TypeError, OverflowError, AssertionError, ProtocolError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def wrong_examples(page: str) -> list[str]:
    return [
        f"{example.side}, {example.headline}: {why}" for example in examples(page) if (why := complaint(example))
    ] + [
        f"{example.side}, {example.headline}: this is a {json.loads(example.text)['type']}"
        for example in examples(page)
        if not complaint(example) and json.loads(example.text)["type"] not in re.split(r",\s*", example.headline)
    ]


def without_an_example(page: str) -> set[str]:
    """The frames that no example becomes; what the host spells itself has none."""
    shown = {
        (example.side, frames.Recovery if example.side == SERVER and is_recovery(value) else kind_of(example, value))
        for example in examples(page)
        for value in [json.loads(example.text)]
    }
    wanted = {(CLIENT, frame) for frame in get_args(frames.ClientFrame)}
    wanted |= {(SERVER, frame) for frame in get_args(frames.ServerFrame) if frame is not frames.Raw}
    return {f"{side}: {frame.__name__}" for side, frame in wanted - shown}


def table(page: str, headline: str) -> list[list[str]]:
    """The rows of the first table after a headline, without its head."""
    after = re.split(rf"^##+ {headline}$", page, flags=re.MULTILINE)[1]
    found = re.search(r"(?:^\|.*\|\n)+", after, re.MULTILINE)
    rows = found[0].splitlines()[2:] if found else []
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def close_codes(page: str) -> dict[int, bool]:
    """Of each close code on the page: whether to come back."""
    return {
        int(code): comes_back == "yes"
        for codes, _, comes_back in table(page, "Close codes")
        for code in codes.split(",")
    }


def error_codes(page: str) -> dict[str, bool]:
    """Of each code of an error on the page: whether it is temporary."""
    rows = [row for row in table(page.split(f"## {SERVER}")[1], "error") if row]
    return {code: temporary == "yes" for codes, temporary, _ in rows for code in re.findall(r"`(\w+)`", codes)}


def test_every_example_becomes_its_frame_and_is_said_again_in_both_spellings() -> None:
    assert wrong_examples(PAGE) == []


def test_every_frame_has_an_example() -> None:
    assert without_an_example(PAGE) == set()


def test_every_example_of_the_page_is_looked_at() -> None:
    sections = PAGE[PAGE.index(f"## {CLIENT}") : PAGE.index("## Coming back")]
    assert len(list(examples(PAGE))) == PAGE.count("```json") == sections.count("```json") > 30


@pytest.mark.parametrize(
    ("side", "headline", "example", "sentence"),
    [
        (CLIENT, "join", '{"type": "join", "group": "g"', "JSONDecodeError"),
        (CLIENT, "join", '{"type": "join", "group": 7}', "Expected `str`"),
        (CLIENT, "join", '{"type": "join", "group": "g", "colour": 7}', "rt.v1.json says it as"),
        (CLIENT, "join", '{"type": "joined", "group": "g"}', "ValueError"),
        (CLIENT, "leave", '{"type": "join", "group": "g"}', "this is a join"),
        (CLIENT, "event", '{"type": "event", "event": ""}', "event names have 1 to 255 characters"),
        (CLIENT, "event", '{"type": "event", "event": "e", "data": 18446744073709551616}', "OverflowError"),
        (SERVER, "event", '{"type": "event", "group": "g"}', "ProtocolError"),
        (SERVER, "reply", '{"type": "reply", "ref": 1}', "KeyError"),
        (SERVER, "reply", '{"type": "reply", "ref": 1, "data": {"recovered": 1}}', "ProtocolError"),
        (SERVER, "event", '[{"type": "event", "event": "e", "data": 1}]', "TypeError"),
    ],
)
def test_a_wrong_example_is_found(side: str, headline: str, example: str, sentence: str) -> None:
    page = f"# A page\n\n## {side}\n\n### {headline}\n\nWords.\n\n```json\n{example}\n```\n\n## More\n"
    (found,) = wrong_examples(page)
    assert found.startswith(f"{side}, {headline}: ")
    assert sentence in found


def test_a_frame_without_an_example_is_found() -> None:
    page = PAGE.replace('{"type": "pong"}', '{"type": "leave", "group": "g"}')
    assert without_an_example(page) == {f"{CLIENT}: Pong"}
    skipped = re.sub(r', "skip": true\}', ', "event": "e", "data": 1}', page)
    assert without_an_example(skipped) == {f"{CLIENT}: Pong", f"{SERVER}: Skip"}


def test_the_table_of_close_codes_is_ours() -> None:
    ours = {int(code): code.reconnect for code in CloseCode}
    assert close_codes(PAGE) == ours | {DROPPED: True}
    assert all(code.reconnect == (code < 4500) for code in CloseCode if code >= 4000)


def test_another_close_code_is_found() -> None:
    assert close_codes(PAGE.replace("| 4006 |", "| 4099 |")).keys() ^ {*map(int, CloseCode), DROPPED} == {4006, 4099}


def test_the_table_of_error_codes_says_what_can_pass_and_has_all_that_a_protocol_error_may_say() -> None:
    codes = error_codes(PAGE)
    assert {code for code, temporary in codes.items() if temporary} == CAN_PASS
    source = "".join(Path(module.__file__).read_text("utf-8") for module in (v1, bounds, frames))
    said = set(re.findall(r"""(?:ProtocolError|EventError)\("(\w+)",""", source))
    assert said == {"bad_message", "bad_name", "invalid", "too_large", "unsupported"}
    assert not any(codes[code] for code in said)


def test_the_subprotocols_of_the_page_are_ours() -> None:
    assert set(re.findall(r"^\| `(rt\.v1\.\w+)` \|", PAGE, re.MULTILINE)) == V1S.keys()


def test_the_bounds_of_the_page_are_ours() -> None:
    said = re.search(r"\*\*Bounds\*\*(.*?)\n\n", PAGE, re.DOTALL)
    assert said
    numbers = {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\d|\d", said[1])}
    assert numbers >= {plain.MAX_DEPTH, bounds.MAX_ELEMENTS, bounds.MAX_FRAMES, bounds.MAX_ID, frames.MAX_NAME}
