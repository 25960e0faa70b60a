"""Addresses named in requests: fetched only where allowed, only from public servers, and never for long."""

import contextlib
import http.client
import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest

from hf_rsheat.hub import handler_images
from hf_rsheat.hub.handler import EndpointHandler
from hf_rsheat.hub.handler_images import RequestError
from tests.hub.inference_requests import file, handler_of, picture, refusal, text


class FakeConnection:
    """Stands for a public server; keeps what was asked of it."""

    status, content = 200, b""
    asked: tuple = ()
    aborted = False

    def __init__(self, host: str, address: str) -> None:
        type(self).asked = (host, address)

    def request(self, method: str, target: str) -> None:
        type(self).asked += (method, target)

    def getresponse(self):
        return self

    def read(self, size: int) -> bytes:
        return self.content[:size]

    def abort(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def internet(monkeypatch):
    """A resolver with a few names, and no connections."""
    names = {"public.org": ["8.8.8.8"], "mixed.org": ["8.8.8.8", "10.0.0.1"], "home.org": ["127.0.0.1"]}

    def resolve(host, port, *_):
        if host.replace(".", "").isdigit():
            return [(2, 1, 6, "", (host, port))]
        if host not in names:
            raise socket.gaierror(host)
        return [(2, 1, 6, "", (address, port)) for address in names[host]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(handler_images, "_PinnedConnection", FakeConnection)
    monkeypatch.setattr(FakeConnection, "status", 200)
    monkeypatch.setattr(FakeConnection, "content", file(picture()))
    monkeypatch.setattr(FakeConnection, "asked", ())


@pytest.fixture(scope="module")
def fetching() -> EndpointHandler:
    return handler_of("vheat-classifier", allow_urls=True)


def test_an_allowed_address_is_fetched_from_the_address_that_was_checked(fetching, internet):
    answer = fetching({"inputs": "https://public.org/a b/scene.png?x=1&y=ä"})
    assert answer == fetching({"inputs": text(picture())})
    assert FakeConnection.asked == ("public.org", "8.8.8.8", "GET", "/a%20b/scene.png?x=1&y=%C3%A4")


@pytest.mark.parametrize(
    "url",
    [
        "http://public.org/scene.png",
        "https://public.org:8443/scene.png",
        "https://user:secret@public.org/scene.png",
        "https://home.org/scene.png",
        "https://mixed.org/scene.png",
        "https://127.0.0.1/scene.png",
        "https://169.254.169.254/latest/meta-data",
        "https://10.1.2.3/",
        "https://0.0.0.0/",
        "https://100.64.0.1/",
        "https://224.0.0.1/",
    ],
)
def test_private_addresses_and_other_protocols_are_never_fetched(url, fetching, internet):
    assert refusal(fetching({"inputs": url})) == 403
    assert FakeConnection.asked == ()


@pytest.mark.parametrize(
    ("url", "status", "content", "refused"),
    [
        ("https://nowhere.org/", 200, b"", 400),
        ("https://public.org:x/", 200, b"", 400),
        ("https:///scene.png", 200, b"", 403),
        ("https://public.org/", 302, b"", 400),
        ("https://public.org/", 404, b"", 400),
        ("https://public.org/", 200, b"<html>", 415),
        ("https://public.org/", 200, bytes(33 * 2**20), 413),
    ],
)
def test_an_address_without_an_image_is_refused(url, status, content, refused, fetching, internet, monkeypatch):
    monkeypatch.setattr(FakeConnection, "status", status)
    monkeypatch.setattr(FakeConnection, "content", content)
    assert refusal(fetching({"inputs": url})) == refused


def test_a_broken_connection_is_an_answer(fetching, internet, monkeypatch):
    for error in (ConnectionResetError(), TimeoutError(), http.client.BadStatusLine("x")):
        monkeypatch.setattr(FakeConnection, "getresponse", lambda self, error=error: (_ for _ in ()).throw(error))
        assert refusal(fetching({"inputs": "https://public.org/"})) == 400


class SlowServer(http.server.BaseHTTPRequestHandler):
    """Sends its path at once, except `/slow` (a byte now and then) and `/drip` (already the head of the answer)."""

    def do_GET(self):
        self.log_message = lambda *_: None
        if self.path != "/drip":
            self.send_response(200)
            self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(100 if self.path in ("/slow", "/drip") else 1):
                self.wfile.write(self.path.encode())
                time.sleep(0.1 if self.path != "/quick" else 0)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_a_fetch_checks_the_certificate_and_keeps_its_deadline(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate]
    names = ["-days", "2", "-subj", "/CN=public.test", "-addext", "subjectAltName=DNS:public.test"]
    subprocess.run([*command, *names], check=True, capture_output=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowServer)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(handler_images, "_public_address", lambda host: "127.0.0.1")
    monkeypatch.setattr(handler_images, "PORT", server.server_port)
    assert handler_images.fetch("https://public.test/quick", 1000) == b"/quick"
    with pytest.raises(RequestError, match="could not be fetched"):
        handler_images.fetch("https://other.test/quick", 1000)
    monkeypatch.setattr(handler_images, "DEADLINE", 1)
    for path in ("slow", "drip"):
        with pytest.raises(RequestError, match=r"within 1 seconds|could not be fetched"):
            handler_images.fetch(f"https://public.test/{path}", 10**6)
    server.shutdown()


def test_addresses_are_fetched_only_where_the_environment_or_the_caller_says_so(monkeypatch):
    monkeypatch.delenv("HF_RSHEAT_ALLOW_URLS", raising=False)
    assert handler_of("vheat").allow_urls is False
    monkeypatch.setenv("HF_RSHEAT_ALLOW_URLS", "1")
    assert handler_of("vheat").allow_urls is True
    assert handler_of("vheat", allow_urls=False).allow_urls is False
