"""A TCP line to a server that a test can cut and mend.

The law of this file: bytes go through as they come, both ends of a cut line hear it at once, and while it is cut nobody
gets through. It knows nothing of what is said on it.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Self

from tests.servers import HOST, Server

CHUNK = 65536


class Line:
    """Listens on ``http`` and passes on to a server; a context manager."""

    def __init__(self, server: Server) -> None:
        self._target = (HOST, server.port)
        self._listener = socket.create_server((HOST, 0))
        self._lock = threading.Lock()
        self._ends: set[socket.socket] = set()
        self._whole = True
        self.http = f"http://{HOST}:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the one who accepts
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """End every connection, and each new one until the line is mended."""
        with self._lock:
            self._whole = False
            for end in self._ends:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let new connections through."""
        with self._lock:
            self._whole = True

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        with near, suppress(OSError), socket.create_connection(self._target) as far:
            with self._lock:
                if not self._whole:
                    return
                self._ends |= {near, far}
            back = threading.Thread(target=self._pass, args=(far, near), daemon=True)
            back.start()
            self._pass(near, far)
            back.join()
            with self._lock:
                self._ends -= {near, far}

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
