"""The JavaScript client in Node and the server, once through every frame of the protocol, in both spellings.

The law of this file: what is said and checked stands in ``tests/js``; here a server is run and the types of frames are
compared with those of the package, so that a frame which nobody exchanges is found.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import get_args

import pytest

from starlette_rt import frames
from tests.nodes import find
from tests.servers import serve

pytestmark = pytest.mark.system

SCRIPT = Path(__file__).parent / "js" / "live.mjs"
EVENTS = {"call", "skip"}  # an event that is answered, and one that only moves the position


def types(union: object) -> set[str]:
    """The types of the frames of a union, less those that have no type of their own."""
    tagged = [kind for kind in get_args(union) if issubclass(kind, frames.Frame)]
    return {str(kind.__struct_config__.tag) for kind in tagged}


@pytest.mark.parametrize("spelling", ["json", "msgpack"])
@pytest.mark.parametrize("server", ["uvicorn", "uvicorn-rt"])
def test_javascript_and_python_exchange_every_frame(spelling: str, server: str) -> None:
    env = {"PING_INTERVAL": "1.5", "PING_TIMEOUT": "1.5"}
    with serve("tests.speaking:app", server, env=env) as running:
        command = [find(), str(SCRIPT), running.http, spelling]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stderr + running.log()
    exchanged = json.loads(done.stdout.splitlines()[-1])
    assert set(exchanged["said"]) == types(frames.ClientFrame)
    assert set(exchanged["heard"]) == types(frames.ServerFrame) | EVENTS


def test_five_hundred_events_said_offline_arrive_in_order_and_once_under_a_tight_limit() -> None:
    with serve("tests.speaking:app", "uvicorn-rt") as running:
        command = [find(), str(SCRIPT.with_name("offline.mjs")), running.http]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stderr + running.log()
    told = json.loads(done.stdout)
    assert told["queued"] == 500
    assert told["heard"] == list(range(500))
    assert told["numbers"] == list(range(1, 501))
    assert told["code"] == "open"


def test_what_was_pushed_while_one_was_away_is_heard_once_and_in_order() -> None:
    with serve("tests.speaking:app", "uvicorn-rt", env={"KEEP_PUSHES": "1"}) as running:
        command = [find(), str(SCRIPT.with_name("notices.mjs")), running.http]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stderr + running.log()
    told = json.loads(done.stdout)
    assert told["heard"] == ["1", "2", "3", "4"]
    assert told["recovered"] == [False, True, True, False]
