"""An S3 endpoint that fails now and then, in front of one that does not.

A share of the requests, chosen by a seed, is answered by 503 SlowDown or 500, gets no answer (before or after the store
has done what was asked), gets half of the body, or gets it late. Listings leave out what was written just before.
"""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any
from urllib.parse import unquote

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web
from yarl import URL

KINDS = ("slow_down", "internal_error", "reset_before", "reset_after", "truncated", "slow")
_XML = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>a fault of the proxy</Message></Error>'
_ENTRY = re.compile(rb"<Contents>.*?</Contents>", re.DOTALL)
_KEY = re.compile(rb"<Key>(.*?)</Key>", re.DOTALL)
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "content-encoding", "date", "server"}
_SLOW_SECONDS = 0.3


class FaultProxy:
    """The endpoint; a context manager.

    Args:
        backend: URL of the store.
        rate: share of the requests that fail.
        seed: of the choice.
        lag_seconds: for so long after it was written an object is missing from listings.

    Attributes:
        url: of the endpoint.
        faults: how many of each kind, `stale_listing` included.
        expired: whether the credentials have expired: then every request is refused.
    """

    def __init__(self, backend: str, *, rate: float, seed: int, lag_seconds: float = 0.0) -> None:
        self.rate = rate
        self.faults: Counter[str] = Counter()
        self.expired = False
        self.url = ""
        self._backend = backend.rstrip("/")
        self._random = random.Random(seed)
        self._lag = lag_seconds
        self._written: dict[str, float] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(60)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _start(self) -> None:
        self._client = ClientSession(
            connector=TCPConnector(limit=0), timeout=ClientTimeout(total=120), auto_decompress=False
        )
        self._runner = web.ServerRunner(web.Server(self._answer), access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        server: Any = site._server
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _stop(self) -> None:
        await self._client.close()
        await self._runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        fault = self._random.choice(KINDS) if self._random.random() < self.rate else None
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await request.read()
        if self.expired:
            return web.Response(status=400, text=_XML.format("ExpiredToken"), content_type="application/xml")
        if fault is not None:
            self.faults[fault] += 1
        if fault == "slow_down":
            return web.Response(status=503, text=_XML.format("SlowDown"), content_type="application/xml")
        if fault == "internal_error":
            return web.Response(status=500, text=_XML.format("InternalError"), content_type="application/xml")
        if fault == "reset_before":
            return self._reset(request)
        status, headers, content = await self._of_store(request, body)
        if fault == "reset_after":
            return self._reset(request)
        if fault == "slow":
            await asyncio.sleep(_SLOW_SECONDS)
        if request.method == "HEAD":
            response = web.StreamResponse(status=status, headers=headers)
            await response.prepare(request)
            return response
        kept = {name: value for name, value in headers.items() if name.lower() != "content-length"}
        if fault != "truncated" or len(content) < 2:
            return web.Response(status=status, headers=kept, body=content)
        cut = web.StreamResponse(status=status, headers=kept | {"Content-Length": str(len(content))})
        await cut.prepare(request)
        await cut.write(content[: len(content) // 2])
        return self._reset(request)

    async def _of_store(self, request: web.BaseRequest, body: bytes) -> tuple[int, dict[str, str], bytes]:
        url = URL(self._backend + request.raw_path, encoded=True)
        headers = {
            name: value for name, value in request.headers.items() if name.lower() not in ("connection", "expect")
        }
        async with self._client.request(request.method, url, headers=headers, data=body) as response:
            content = await response.read()
            kept = {name: value for name, value in response.headers.items() if name.lower() not in _HOP_BY_HOP}
            if request.method == "HEAD" and "Content-Length" in response.headers:
                kept["Content-Length"] = response.headers["Content-Length"]
            path = unquote(request.raw_path.partition("?")[0])
            if request.method == "PUT" and response.status < 300:
                self._written[path.strip("/").partition("/")[2]] = time.monotonic()
            return response.status, kept, self._as_seen_before(content) if "list-type" in request.raw_path else content

    def _as_seen_before(self, listing: bytes) -> bytes:
        """A listing without the objects that were written just before."""
        if not self._lag:
            return listing
        since = time.monotonic() - self._lag

        def kept(entry: re.Match[bytes]) -> bytes:
            key = _KEY.search(entry[0])
            name = unquote(key[1].decode()) if key else ""
            if self._written.get(name, 0.0) < since:
                return entry[0]
            self.faults["stale_listing"] += 1
            return b""

        return _ENTRY.sub(kept, listing)

    def _reset(self, request: web.BaseRequest) -> web.StreamResponse:
        """End the connection without an answer, or in the middle of one."""
        if request.transport is not None:
            request.transport.abort()
        return web.StreamResponse()
