"""The handler under load, behind the server that Inference Endpoints' users test with (slow: its own environment)."""

import base64
import http.client
import io
import json
import os
import random
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_rsheat import export
from hf_rsheat.hub.handler import EndpointHandler
from hf_rsheat.hub.inference import write_handler
from tests.hub.inference_requests import bomb
from tests.zoo import ZOO

REQUESTS, WARM_UP, CLIENTS = 1000, 200, 8
JSON = "application/json"


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(30, 300, 2)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def good_requests() -> list[tuple[bytes, str, dict]]:
    """(body, content type, what the handler gets) of 20 requests of all kinds."""
    parameters = [{}, {"top_k": 2}, {"features": True, "heat_maps": True}, {"modality": "optical", "features": True}]
    requests = []
    for seed in range(16):
        text = base64.b64encode(encode(picture(seed), ["PNG", "JPEG"][seed % 2])).decode()
        data = {"inputs": [text, text] if seed % 5 == 0 else text, "parameters": parameters[seed % 4]}
        requests.append((json.dumps(data).encode(), JSON, data))
    for seed in range(16, 20):
        requests.append((encode(picture(seed)), "image/png", {"inputs": picture(seed)}))
    return requests


def broken_requests() -> list[tuple[bytes, str]]:
    image = encode(picture(0))

    def as_json(inputs, **parameters) -> tuple[bytes, str]:
        return json.dumps({"inputs": inputs, "parameters": parameters}).encode(), JSON

    def as_text(data: bytes) -> str:
        return base64.b64encode(data).decode()

    rng = random.Random(0)
    flipped = bytearray(image)
    for _ in range(40):
        flipped[rng.randrange(8, len(flipped))] ^= 255
    return [
        (b"", JSON),
        (b"{", JSON),
        (b"[" * 200_000, JSON),
        (b"{}", JSON),
        (image[:100], "image/png"),
        (bytes(1000), "image/jpeg"),
        (image, "text/strange"),
        as_json("no base64 !"),
        as_json(as_text(image[: len(image) // 2])),
        as_json(as_text(bytes(flipped))),
        as_json(as_text(bomb(60_000, 60_000))),
        as_json(as_text(bomb(9000, 9900))),
        as_json(as_text(image), top_k=-1),
        as_json(as_text(image), modality="lidar"),
        as_json([as_text(image)] * 40),
        as_json([]),
        as_json(7),
        as_json("https://169.254.169.254/latest/meta-data"),
        as_json(as_text(encode(Image.new("RGB", (9000, 3))))),
        as_json(as_text(b"%!PS-Adobe-3.0 EPSF-3.0\n")),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    entry = ZOO["rs-vheat-classifier"]
    folder = export(entry.model(), entry.processor(size=64), tmp_path_factory.mktemp("hub") / "model")
    write_handler(folder)
    return folder


@pytest.fixture(scope="module")
def emulator(folder, tmp_path_factory):
    """(port, process id) of hf-endpoints-emulator, which needs starlette<1 and so an environment of its own."""
    root = tmp_path_factory.mktemp("emulator")
    venv.create(root, with_pip=False)
    install = [sys.executable, "-m", "pip", "--python", str(root / "bin/python"), "install", "--quiet", "--no-deps"]
    installed = subprocess.run([*install, "hf-endpoints-emulator", "starlette<1"], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip("hf-endpoints-emulator could not be installed")
    # Searched after its own packages; a plain path, so that this package's editable install stays off.
    site = next(root.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [root / "bin/python", "-m", "hf_endpoints_emulator.cli", "--handler", "handler.py", "--port", str(port)]
    environment = {**os.environ, "HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (root / "log.txt").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(300):
            assert server.poll() is None, (root / "log.txt").read_text()[-3000:]
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield port, server.pid
        assert server.poll() is None
        log_text = (root / "log.txt").read_text()
        assert "No module named 'hf_rsheat'" not in log_text
        assert "Traceback" not in log_text, log_text[-3000:]
    finally:
        server.terminate()
        server.wait(30)


def ask(port: int, body: bytes, content_type: str) -> tuple[int, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/", body, {"Content-Type": content_type})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def resident(pid: int) -> int:
    """Resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def same(actual, expected) -> bool:
    """Equal up to the rounding of another process; pictures may differ by one grey level."""
    if isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(same(actual[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(actual) == len(expected) and all(map(same, actual, expected))
    if isinstance(expected, str) and len(expected) > 60:
        pixels = [np.array(Image.open(io.BytesIO(base64.b64decode(png))), dtype=int) for png in (actual, expected)]
        return pixels[0].shape == pixels[1].shape and abs(pixels[0] - pixels[1]).max() <= 1
    return actual == (pytest.approx(expected, abs=1e-6) if isinstance(expected, float) else expected)


@pytest.mark.slow
def test_a_thousand_requests_from_eight_clients(folder, emulator):
    """No crash, no leak, every good answer right, every bad one refused. Numbers are printed (`pytest -s`)."""
    port, pid = emulator
    handler = EndpointHandler(str(folder))
    good = [(body, kind, handler(data)) for body, kind, data in good_requests()]
    assert not any(isinstance(answer, dict) and "error" in answer for _, _, answer in good)
    broken = broken_requests()
    jobs = [(*good[index % len(good)], True) for index in range(REQUESTS * 9 // 10)]
    jobs += [(*broken[index % len(broken)], None, False) for index in range(REQUESTS // 10)]
    random.Random(0).shuffle(jobs)

    def run(job) -> tuple[float, int]:
        body, kind, expected, is_good = job
        started = time.monotonic()
        status, answer = ask(port, body, kind)
        seconds = time.monotonic() - started
        if is_good:
            assert status == 200
            assert same(answer, expected)
        else:
            assert "error" in answer, answer
            assert "Traceback" not in json.dumps(answer)
        return seconds, resident(pid)

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(run, random.Random(1).sample(jobs, WARM_UP)))
        before = resident(pid)
        started = time.monotonic()
        results = list(clients.map(run, jobs))
    elapsed, growth = time.monotonic() - started, resident(pid) / before - 1
    peak = max(memory for _, memory in results) / before - 1
    median, slowest = np.percentile([seconds for seconds, _ in results], [50, 100])
    print(
        f"\n{len(jobs)} requests, {REQUESTS // 10} broken, {CLIENTS} clients: {elapsed:.1f} s, median {median:.3f} s, "
        f"slowest {slowest:.3f} s; memory {before / 2**20:.0f} MiB after {WARM_UP}, {growth:+.2%} at the end, "
        f"{peak:+.2%} at most"
    )
    assert growth < 0.05
