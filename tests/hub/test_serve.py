"""`hf-rsheat serve` answers over HTTP what the handler answers in process, with statuses that clients understand."""

import base64
import http.client
import io
import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import uvicorn
from PIL import Image

from hf_rsheat import export
from hf_rsheat.errors import ConfigurationError, MissingExtraError
from hf_rsheat.hub import serve as serving
from hf_rsheat.hub.handler import EndpointHandler, Limits
from tests.zoo import ZOO


@pytest.fixture(scope="module")
def handler() -> EndpointHandler:
    entry = ZOO["rs-vheat-classifier"]
    limits = Limits(body=200_000)
    return EndpointHandler(model=entry.model(), processor=entry.processor(size=64), limits=limits)


@pytest.fixture(scope="module")
def port(handler):
    config = uvicorn.Config(serving.create_app(handler), host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def image() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def ask(port: int, body: bytes | None, content_type: str | None = None, path: str = "/") -> tuple[int, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": content_type} if content_type else {}
    connection.request("GET" if body is None else "POST", path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content)


def as_json(inputs, **parameters) -> bytes:
    return json.dumps({"inputs": inputs, "parameters": parameters}).encode()


def test_json_and_raw_images_get_the_handlers_answer(port, handler, image):
    encoded = base64.b64encode(image).decode()
    expected = handler({"inputs": encoded, "parameters": {"top_k": 2, "features": True}})
    assert ask(port, as_json(encoded, top_k=2, features=True), "application/json") == (200, expected)
    assert ask(port, as_json(encoded, top_k=2, features=True), path="/predict") == (200, expected)
    assert ask(port, image, "image/png", "/?top_k=2&features=true&modality=optical") == (200, expected)
    assert ask(port, image, "application/octet-stream", "/?top_k=2&features=true") == (200, expected)
    assert ask(port, as_json([encoded, encoded], top_k=2, features=True)) == (200, [expected, expected])


def test_health_says_what_is_served(port):
    for path in ("/", "/health"):
        status, answer = ask(port, None, path=path)
        assert (status, answer["status"], answer["model"]) == (200, "ok", "RSVHeatForImageClassification")
        assert answer["modalities"] == ["optical", "sar"]


@pytest.mark.parametrize(
    ("body", "content_type", "path", "status"),
    [
        (b"", "application/json", "/", 400),
        (b"{", "application/json", "/", 400),
        (b"\xff\xfe\x00", "application/json", "/", 400),
        (b"[" * 100_000, "application/json", "/", 400),
        (b"[]", "application/json", "/", 400),
        (b"{}", "application/json; charset=utf-8", "/", 400),
        (as_json("!"), "application/json", "/", 400),
        (as_json("https://example.org/scene.png"), "application/json", "/", 403),
        (as_json(base64.b64encode(b"hello").decode()), "application/json", "/", 415),
        (b"hello", "image/png", "/", 415),
        (b"hello", "image/png", "/?top_k=many", 400),
        (b"hello", "image/png", "/?topk=1", 400),
        (b"hello", "text/plain", "/", 415),
        (b"hello", "multipart/form-data", "/", 415),
        (bytes(200_001), "image/png", "/", 413),
    ],
)
def test_bad_requests_get_their_status_and_one_sentence(port, body, content_type, path, status):
    actual, answer = ask(port, body, content_type, path)
    assert actual == status == answer["error"]["status"]
    assert "Traceback" not in answer["error"]["message"]


def test_a_client_that_hangs_up_disturbs_nobody(port, image):
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nabc")
    assert ask(port, image, "image/png")[0] == 200


def test_clients_at_the_same_time_get_their_own_answers(port, handler):
    def picture(seed: int) -> str:
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (40 + seed, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, format="PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    pictures = [picture(seed) for seed in range(8)]
    expected = [handler({"inputs": item}) for item in pictures]
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda item: ask(port, as_json(item)), pictures * 2))
    assert answers == [(200, answer) for answer in expected * 2]


def test_serving_a_folder_uses_our_classes_and_listens_to_this_computer_only(tmp_path, monkeypatch, image):
    entry = ZOO["vheat-classifier"]
    folder = export(entry.model(), entry.processor(), tmp_path / "model")
    started: dict = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: started.update(app=app, **options))
    monkeypatch.setattr(serving, "create_app", lambda handler: handler)
    serving.serve(folder)
    assert (started["host"], started["port"]) == ("127.0.0.1", 8000)
    assert type(started["app"].model).__module__ == "hf_rsheat.models.modeling_vheat"
    assert not started["app"].allow_urls
    assert len(started["app"]({"inputs": image})) == 3
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        serving.serve(tmp_path)


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch, handler):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtraError, match=r"hf_rsheat\[serve\]"):
        serving.serve(tmp_path)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(MissingExtraError, match=r"hf_rsheat\[serve\]"):
        serving.create_app(handler)
