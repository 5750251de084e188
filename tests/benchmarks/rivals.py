"""The contenders of the benchmarks on one node: who they are, and how each is prepared.

What must live here: the table of contenders, and what is installed for which of them. What must not: an application
(see `apps/`), a measurement. Whoever needs fewer picks from `CONTENDERS` by the short name; nothing is installed
before `prepare` is called, and then only what its contenders need.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace

from tests.benchmarks import common

ENGINE = "/socket.io/?EIO=4&transport=websocket"
V1 = ["--offer", "rt.v1.json"]
NODE = "node"  # all Node.js contenders share one folder and one package.json
PACKAGES = {  # folder under `.bench/` -> what PyPI puts there
    "python-socketio": ["python-socketio"],
    "channels-memory": ["channels"],
    "litestar": ["litestar"],
    "broadcaster": ["broadcaster"],
}


def rival(name: str, title: str, app: str, folder: str, share: float = 1.0) -> common.Contender:
    """A rival in Python, on the same uvicorn as the others, with what PyPI installs into `folder`."""
    made = replace(common.uvicorn(name, title, app), share=share, prepare=folder)
    return common.with_python(made, folder)


def floor(name: str, title: str, loop: str) -> common.Contender:
    """The same bytes from a bare protocol on this event loop: what no server on it can undercut."""
    return common.Contender(name, title, [sys.executable, "-m", "tests.benchmarks.apps.floor", "{fd}", loop])


def named(*contenders: common.Contender) -> dict[str, common.Contender]:
    """By short name, in the order given."""
    return {contender.name: contender for contender in contenders}


GENERIC = common.uvicorn("generic", "starlette_rt, any server", "realtime:loop")
QUICK = common.uvicorn("fast", "starlette_rt, its uvicorn class", "realtime:loop", common.FAST)

CONTENDERS = named(
    common.uvicorn("loop", "hand-written Starlette loop", "by_hand:loop"),
    replace(
        rival("python-socketio", "python-socketio", "rival_socketio:app", "python-socketio", share=0.2),
        path=ENGINE,
        load=["--socketio"],
    ),
    rival("channels", "Django Channels, in-memory layer", "rival_channels:app", "channels-memory", share=0.05),
    rival("litestar", "Litestar, channels plugin", "rival_litestar:app", "litestar", share=0.5),
    rival("broadcaster", "broadcaster, `memory://`", "rival_broadcaster:app", "broadcaster", share=0.5),
    replace(common.socketio(), prepare=NODE),
    replace(common.socketio("ws", "Node.js, ws", "ws.js"), path="/ws", load=(), prepare=NODE),
    GENERIC,
    QUICK,
    replace(GENERIC, name="generic-v1", title=f"{GENERIC.title}, rt.v1", load=V1),
    replace(QUICK, name="fast-v1", title=f"{QUICK.title}, rt.v1", load=V1),
    floor("floor", "floor: the same bytes, bare uvloop", "uvloop"),
    floor("floor-asyncio", "floor: the same bytes, bare asyncio", "asyncio"),
)


def silent(contender: common.Contender) -> common.Contender:
    """The same without uvicorn's pings."""
    if "uvicorn" not in contender.command:
        return contender
    return replace(contender, command=[*contender.command, "--ws-ping-interval", "3600"])


def prepare(contenders: Iterable[common.Contender]) -> None:
    """Install what these need into `.bench/`, unless it is there; raises `SystemExit` with the reason."""
    needs = {contender.prepare for contender in contenders} - {None}
    for need in sorted(str(each) for each in needs):
        if need == NODE:
            common.prepare_socketio()
        else:
            common.prepare_python(need, *PACKAGES[need])


def facts(contenders: Iterable[common.Contender]) -> str:
    """The versions of what was installed from PyPI for these, and of `ws`, as a list with commas; may be empty."""
    needs = list(dict.fromkeys(contender.prepare for contender in contenders if contender.prepare))
    said = [common.python_facts(need, *PACKAGES[need]) for need in needs if need != NODE]
    return ", ".join([*said, *([common.npm_facts("ws")] if NODE in needs else [])])
