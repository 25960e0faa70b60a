"""Images of a request: reading them within limits, fetching them, and writing pictures into an answer.

Travels to the Hub beside `handler.py`; needs nothing but NumPy and Pillow.
"""

import base64
import binascii
import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import urllib.parse
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

# Formats whose decoders are pure pixel readers: no PostScript, no vector graphics, no containers.
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")
DEADLINE = 20  # seconds for fetching one address
PORT = 443


@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Attributes:
        images: per request.
        bytes: of one encoded image.
        pixels: of one decoded image; never more than Pillow's own limit against decompression bombs.
        aspect_ratio: longer over shorter side; resizing a long strip to the model's size would blow it up.
        mask_values: classes times pixels of a segmentation, 4 bytes each.
        body: bytes of a whole request; for the server, since the handler sees it too late.
    """

    images: int = 16
    bytes: int = 32 * 2**20
    pixels: int = 2**25
    aspect_ratio: float = 50
    mask_values: int = 2**28
    body: int = 64 * 2**20


class RequestError(ValueError):
    """A request that is refused: an HTTP status and one sentence that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def read_image(item: Any, limits: Limits, allow_urls: bool = False) -> Image.Image:
    """Return a decoded image, upright.

    Args:
        item: Base64 text or the bytes of an image file, a PIL image, or an `https://` address.
        limits: What it may cost; the size is read from the header before any pixel is decoded.
        allow_urls: Whether addresses are fetched.

    Raises:
        RequestError: Not an image, too large, or an address that is not fetched.
    """
    if isinstance(item, str) and item[:8].lower().startswith(("http://", "https://")):
        if not allow_urls:
            raise RequestError(403, "This server fetches no addresses: send the image itself as base64 text.")
        item = fetch(item, limits.bytes)
    elif isinstance(item, str):
        item = _from_base64(item, limits)
    if isinstance(item, bytes | bytearray):
        if len(item) > limits.bytes:
            raise RequestError(413, f"An image file may have at most {limits.bytes} bytes.")
    elif not isinstance(item, Image.Image):
        raise RequestError(400, "An image must be base64 text or the bytes of an image file.")
    try:
        image = item if isinstance(item, Image.Image) else Image.open(io.BytesIO(item), formats=FORMATS)
        _check_size(image, limits)
        return ImageOps.exif_transpose(image)
    except RequestError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(413, f"An image may have at most {limits.pixels} pixels.") from error
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        raise RequestError(415, f"This is no readable {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file.") from error


def _from_base64(text: str, limits: Limits) -> bytes:
    if len(text) > limits.bytes * 3 // 2 + 128:  # 4/3, with room for line breaks
        raise RequestError(413, f"An image file may have at most {limits.bytes} bytes.")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(400, "The text of an image must be base64.") from error


def _check_size(image: Image.Image, limits: Limits) -> None:
    width, height = image.size
    pixels = min(limits.pixels, Image.MAX_IMAGE_PIXELS or limits.pixels)
    if width * height > pixels:
        raise RequestError(413, f"An image may have at most {pixels} pixels; this one has {width} x {height}.")
    if max(width, height) > limits.aspect_ratio * min(width, height):
        raise RequestError(413, f"An image of {width} x {height} pixels is too long and thin.")


def to_png(pixels: np.ndarray) -> str:
    """Base64 PNG of `(height, width)` or `(height, width, 3)`: uint8 as it is, floats from 0 to 1."""
    if pixels.dtype != np.uint8:
        pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def fetch(url: str, max_bytes: int) -> bytes:
    """Download a public `https://` address, without redirects, proxies or cookies.

    The name is resolved once, to IPv4; every address is checked, and the connection goes to a checked one: a name that
    points into a private network, now or at a second look, leads nowhere.

    Raises:
        RequestError: Not https on port 443, a private address, a redirect, too large, too slow, or no answer.
    """
    connection = watchdog = None
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
        if parts.scheme != "https" or not host or port not in (None, PORT) or "@" in parts.netloc:
            raise RequestError(403, "Only https:// addresses on port 443 without a password are fetched.")
        connection = _PinnedConnection(host, _public_address(host))
        watchdog = threading.Timer(DEADLINE, connection.abort)
        watchdog.start()
        target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection.request("GET", urllib.parse.quote(target, safe="/%:@!$&'()*+,;=~?"))
        response = connection.getresponse()
        if response.status != 200:
            raise RequestError(400, f"The address answered {response.status} instead of an image.")
        content = response.read(max_bytes + 1)
        if connection.aborted:  # then the end of the data is not the end of the file
            raise RequestError(400, f"The address did not send its image within {DEADLINE} seconds.")
    except RequestError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RequestError(400, "The address could not be fetched.") from error
    finally:
        if watchdog is not None:
            watchdog.cancel()
        if connection is not None:
            connection.close()
    return content  # the caller checks its size


def _public_address(host: str) -> str:
    found = socket.getaddrinfo(host, PORT, socket.AF_INET, socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(info[4][0]) for info in found]
    if not addresses or any(not address.is_global or address.is_multicast for address in addresses):
        raise RequestError(403, "Only public addresses are fetched.")
    return str(addresses[0])


class _PinnedConnection(http.client.HTTPSConnection):
    """HTTPS to one checked address, with the certificate of the name that was asked for."""

    def __init__(self, host: str, address: str) -> None:
        super().__init__(host, timeout=DEADLINE)
        self._address = address
        self._opened: ssl.SSLSocket | None = None  # `sock` is forgotten as soon as the answer's head has arrived
        self.aborted = False

    def connect(self) -> None:
        plain = socket.create_connection((self._address, PORT), self.timeout)
        self.sock = self._opened = ssl.create_default_context().wrap_socket(
            plain, server_hostname=self.host, do_handshake_on_connect=False
        )
        self._opened.do_handshake()

    def abort(self) -> None:
        """Break off from another thread: whatever waits for the socket gets an OSError or the end of the data."""
        self.aborted = True
        if self._opened is not None:
            with contextlib.suppress(OSError):  # it may have ended by itself just now
                self._opened.shutdown(socket.SHUT_RDWR)
