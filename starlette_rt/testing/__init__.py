"""What a test needs to talk to an app in this process: ``connect``, ``lifespan`` and what they raise.

The law of this folder: it stands on top of everything, nothing else imports it, and it needs no test framework.
``server`` is the server's half (ASGI, lifespan), ``client`` the half a test holds in its hand.
"""

from __future__ import annotations

from starlette_rt.testing.client import Client, Closed, Refused, connect
from starlette_rt.testing.server import lifespan

__all__ = ["Client", "Closed", "Refused", "connect", "lifespan"]
