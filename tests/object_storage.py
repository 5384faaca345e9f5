"""Object storage for the tests: real servers in processes of their own, and a proxy that spoils what passes through it."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from small import ROOT

AZURE_ACCOUNT = "devstoreaccount1"
# the key that every Azurite is born with, published by its makers
AZURE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
_AZURITE = ROOT / ".work" / "azurite"


def free_port() -> int:
    """A port on loopback that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def _serving(
    command: list[str], port: int, log: Path, environment: dict[str, str] | None = None
) -> Iterator[None]:
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{command[0]} does not listen: {log.read_text()}"
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """An S3-protocol server in its own process, listening on the port given; its log is in `folder`."""
    port = free_port()
    code = "import sys; from moto.server import main; main(sys.argv[1:])"
    with _serving(
        [sys.executable, "-c", code, "-H", "127.0.0.1", "-p", str(port)], port, folder / "moto.log"
    ):
        yield port


@contextmanager
def azure_server(folder: Path) -> Iterator[int]:
    """An Azure Blob server (Azurite) in its own process. Skips the test where neither it nor npm is there."""
    command, port = _azurite(folder), free_port()
    more = ["--silent", "--skipApiVersionCheck", "--inMemoryPersistence", "--disableTelemetry"]
    with _serving(
        [command, "--blobHost", "127.0.0.1", "--blobPort", str(port), *more],
        port,
        folder / "azurite.log",
    ):
        yield port


def _azurite(folder: Path) -> str:
    installed = _AZURITE / "node_modules" / ".bin" / "azurite-blob"
    if found := shutil.which("azurite-blob") or (str(installed) if installed.exists() else None):
        return found
    if not shutil.which("npm"):
        pytest.skip("neither azurite-blob nor npm to install it is on this machine's PATH")
    _AZURITE.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(_AZURITE), "azurite@3"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    if done.returncode or not installed.exists():
        pytest.skip(
            f"`npm install azurite` does not work on this machine: {done.stderr.strip()[-300:]}"
        )
    return str(installed)


def azure_connection(port: int) -> str:
    """The connection string of an Azurite on `port`."""
    return (
        f"DefaultEndpointsProtocol=http;AccountName={AZURE_ACCOUNT};AccountKey={AZURE_KEY};"
        f"BlobEndpoint=http://127.0.0.1:{port}/{AZURE_ACCOUNT};"
    )


class FaultyProxy:
    """Passes HTTP on to a server, a request per connection, and spoils as many requests of a method as it is told to.

    Faults: "500", "503" and "403" answer so themselves; "reset" drops the connection in the middle of the request's body;
    "truncated" does so in the middle of the answer's; "short" sends half an answer that claims to be whole; "flipped" one with
    a bit of its body changed and its checksum's header as it was; "skewed" is the answer to a clock that is wrong.
    """

    def __init__(self, upstream: int):
        self.upstream, self.port = upstream, free_port()
        self.spoilt: list[str] = []
        self._fault, self._method, self._left = "", "", 0
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where clients reach it."""
        return f"http://127.0.0.1:{self.port}"

    def spoil(self, fault: str, method: str, times: int) -> None:
        """Spoil the next `times` requests of `method`."""
        self._fault, self._method, self._left, self.spoilt = fault, method, times, []

    def start(self) -> None:
        """Listen; before, connections are refused."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        if self._listener:
            with suppress(OSError):  # close alone leaves a blocked accept listening
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _take(self, method: str) -> str:
        with self._lock:
            if method != self._method or not self._left:
                return ""
            self._left -= 1
            self.spoilt.append(self._fault)
            return self._fault

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            head, rest = _until(client, b"", b"\r\n\r\n")
            if not head:
                return
            lines = head.decode("latin-1").split("\r\n")
            method = lines[0].split()[0]
            headers = {
                k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])
            }
            fault = self._take(method)
            if "100-continue" in headers.get("expect", ""):
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            length = int(headers.get("content-length", 0))
            if fault == "reset":
                while len(rest) < length // 2 and (more := client.recv(65536)):
                    rest += more
                client.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )  # close sends RST
                return
            body = (
                _chunks(client, rest)
                if headers.get("transfer-encoding") == "chunked"
                else _exactly(client, rest, length)
            )
            client.sendall(
                _own_answer(fault, method) if fault in _OWN else self._pass_on(lines, body, fault)
            )

    def _pass_on(self, lines: list[str], body: bytes, fault: str) -> bytes:
        kept = [
            line for line in lines if line.lower().partition(":")[0] not in ("connection", "expect")
        ]
        with socket.create_connection(("127.0.0.1", self.upstream)) as server:
            server.sendall(
                "\r\n".join([*kept, "Connection: close", "", ""]).encode("latin-1") + body
            )
            answer = b""
            while more := server.recv(65536):
                answer += more
        head, _, content = answer.partition(b"\r\n\r\n")
        if fault == "flipped" and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        elif fault == "truncated":
            content = content[: len(content) // 2]
        elif fault == "short":
            content = content[: len(content) // 2]
            stays = [
                line
                for line in head.split(b"\r\n")
                if not line.lower().startswith(
                    (b"content-length", b"x-amz-checksum", b"content-range")
                )
            ]
            head = b"\r\n".join([*stays, b"Content-Length: " + str(len(content)).encode()])
        return head + b"\r\n\r\n" + content


def _until(client: socket.socket, data: bytes, mark: bytes) -> tuple[bytes, bytes]:
    while mark not in data:
        more = client.recv(65536)
        if not more:
            return b"", b""
        data += more
    head, _, rest = data.partition(mark)
    return head, rest


def _exactly(client: socket.socket, data: bytes, length: int) -> bytes:
    while len(data) < length and (more := client.recv(65536)):
        data += more
    return data


def _chunks(client: socket.socket, data: bytes) -> bytes:
    body = b""
    while True:
        size, data = _until(client, data, b"\r\n")
        data = _exactly(client, data, int(size, 16) + 2)
        body, data, count = (
            body + size + b"\r\n" + data[: int(size, 16) + 2],
            data[int(size, 16) + 2 :],
            int(size, 16),
        )
        if not count:
            return body


_OWN = {
    "500": ("InternalError", "Internal Server Error"),
    "503": ("SlowDown", "Slow Down"),
    "403": ("AccessDenied", "Forbidden"),
    "skewed": (
        "RequestTimeTooSkewed",
        "The difference between the request time and the current time is too large.",
    ),
}


def _own_answer(fault: str, method: str) -> bytes:
    code, reason = _OWN[fault]
    status = "403" if fault == "skewed" else fault
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{reason}</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + (b"" if method == "HEAD" else body)
