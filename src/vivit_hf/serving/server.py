"""Run the application with uvicorn until a signal ends it."""

import asyncio
import logging
import signal
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol


# A connection whose next request has not begun after this many seconds is closed, however slowly its headers drip.
_HEAD_SECONDS = 10.0
# What answers need beyond the deadline of their requests when the server ends.
_SPARE_SECONDS = 5


class TimedProtocol(H11Protocol):
    """uvicorn's protocol with a limit on the time until a request has begun; uvicorn waits for ever."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def on_response_complete(self) -> None:
        self._expect_head()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()

    def _expect_head(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(_HEAD_SECONDS, self._close_if_waiting)

    def _close_if_waiting(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def run_server(app: FastAPI, listener: socket.socket, deadline: float) -> None:
    """
    Answer requests until SIGINT or SIGTERM; then answer those in progress, and return.

    Args:
        listener: a bound socket; it is closed at the end.
        deadline: seconds after which every request has an answer.
    """
    config = uvicorn.Config(
        app,
        http=TimedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,  # the process has its own
        access_log=False,
        proxy_headers=False,  # anybody can write them
        server_header=False,
        timeout_graceful_shutdown=int(deadline) + _SPARE_SECONDS,
    )
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # its warnings are for clients, who get an answer
    # uvicorn raises the signal again at the end: SIGTERM asks for no error.
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, previous)
