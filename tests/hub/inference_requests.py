"""Requests that the tests of hosted inference send: handlers, pictures, and what a refusal looks like."""

import base64
import io
import struct
import zlib

import numpy as np
from PIL import Image

from hf_rsheat.hub.handler import EndpointHandler
from tests.zoo import ZOO

SIZE = {"height": 64, "width": 64}


def handler_of(name: str, **options) -> EndpointHandler:
    processor = ZOO[name].processor
    size = {} if "classifier" in name and "rs" not in name else {"size": SIZE}
    return EndpointHandler(model=ZOO[name].model(), processor=processor(**size), **options)


def picture(width: int = 80, height: int = 60, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode=mode) if mode == "L" else Image.fromarray(pixels)


def file(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def text(image: Image.Image) -> str:
    return base64.b64encode(file(image)).decode()


def opened(png: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(png))))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width x height pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def refusal(answer) -> int:
    """The status of a refusal, which must be one clear sentence."""
    assert set(answer) == {"error"}, answer
    message = answer["error"]["message"]
    assert message
    assert "Traceback" not in message
    assert "\n" not in message
    assert len(message) < 600
    return answer["error"]["status"]
