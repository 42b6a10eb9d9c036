"""A real S3 server over HTTP on loopback, and a proxy in front of it that misbehaves to order."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

KEY_ID, SECRET = "AKIAEXAMPLEOFLCRAY", "wJalrXUtnFEMI/K7MDENG/secret-of-lcray"
SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
#: Method and path of a request to what becomes of it: "pass", "throttle" (503 SlowDown), "drop"
#: (the connection ends in the middle of the body), "truncate" (half of the body, under a header
#: that agrees with it) or "lose" (the server does it, and the answer never comes).
Fate = Callable[[str, str], str]


@contextmanager
def s3_server() -> Iterator[str]:
    """A server; gives its address."""
    from moto.server import ThreadedMotoServer  # takes a second to import

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def environment(endpoint: str) -> dict[str, str]:
    """What a user sets."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def client(endpoint: str) -> Any:
    """Another client than the one under test."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )


def objects(endpoint: str, bucket: str) -> dict[str, bytes]:
    """Everything in a bucket, by its key."""
    s3 = client(endpoint)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
    return {key: s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


@dataclass
class Proxy:
    """Stands in front of a server; `fate` decides over each request."""

    target: str
    fate: Fate = field(default=lambda method, path: "pass")
    seen: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, fate
    address: str = ""
    ignored: tuple[str, ...] = ()  # headers of requests that do not reach the server

    @contextmanager
    def running(self) -> Iterator[Proxy]:
        server = _Server(("127.0.0.1", 0), _handler(self))
        self.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def fail(self, what: str, *, method: str = "", ending: str = "", times: int = 10**9) -> None:
        """From now on, the next `times` requests of that method and path share a fate."""
        left = [times]

        def fate(asked: str, path: str) -> str:
            if method in ("", asked) and path.endswith(ending) and left[0] > 0:
                left[0] -= 1
                return what
            return "pass"

        self.fate = fate

    def throttle_for(self, seconds: float) -> None:
        """Answer SlowDown for a while from the first request on."""
        start: list[float] = []

        def fate(method: str, path: str) -> str:
            start[:] = start or [time.monotonic()]
            return "throttle" if time.monotonic() - start[0] < seconds else "pass"

        self.fate = fate

    def fates(self, what: str) -> int:
        """How many requests met with this."""
        return sum(fate == what for _, _, fate in self.seen)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what these tests are about."""


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    target = urlsplit(proxy.target).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlsplit(self.path).path
            fate = proxy.fate(self.command, path)
            proxy.seen.append((self.command, path, fate))
            if fate == "throttle":
                return self.answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
            upstream = http.client.HTTPConnection(target, timeout=30)
            try:
                asked = {k: v for k, v in self.headers.items() if k.lower() not in proxy.ignored}
                upstream.request(self.command, self.path, body, asked)
                response = upstream.getresponse()
                data = response.read()
            finally:
                upstream.close()
            headers = {k: v for k, v in response.headers.items() if k.lower() not in _OWN}
            if fate == "lose":
                return self.hang_up()
            length = int(response.headers.get("Content-Length") or len(data))
            if fate == "truncate":
                data = data[: len(data) // 2]
                headers = {k: v for k, v in headers.items() if "checksum" not in k.lower()}
                return self.answer(response.status, headers, data)
            self.answer(response.status, headers, data, length, cut=fate == "drop")

        def answer(
            self,
            status: int,
            headers: dict[str, str],
            data: bytes,
            length: int | None = None,
            *,
            cut: bool = False,
        ) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) if length is None else length))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.hang_up()

        def hang_up(self) -> None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()

        def log_message(self, *args: Any) -> None:
            pass

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

    return Handler


_OWN = ("content-length", "connection", "transfer-encoding", "date", "server")


@contextmanager
def using(endpoint: str) -> Iterator[None]:
    """This process, and those that it starts, speak to that server."""
    from lcray.storage.objects import _storage

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(endpoint).items():
            patch.setenv(name, value)
        _storage.cache_clear()  # clients read the environment when they are made
        yield
    _storage.cache_clear()
