"""Fetch a checkpoint from a URL: resumed where it broke off, used only if its SHA-256 is the expected one."""

import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from huggingface_hub import cached_assets_path
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import WeakFileLock, get_session, hf_raise_for_status, tqdm

from hf_rsheat.errors import ConfigurationError, TransferError, VerificationError
from hf_rsheat.hub.records import sha256 as sha256_of
from hf_rsheat.hub.transfer import is_url, pause, public_url, reason

logger = logging.getLogger(__name__)

TIMEOUT = 30.0  # seconds without a byte


def fetch(source: str | Path, sha256: str | None = None, *, cache_dir: str | Path | None = None) -> Path:
    """A local file as it is, or the download of a URL; checked if a hash is given.

    Args:
        source: Path or http(s) URL of a checkpoint.
        sha256: Hex digest the file must have. Required for a URL.
        cache_dir: See [`download`].

    Raises:
        ConfigurationError: A URL without hash.
        TransferError: The download failed.
        VerificationError: The file has another hash.
    """
    if is_url(source):
        if sha256 is None:
            raise ConfigurationError(
                f"{public_url(str(source))} is fetched only with its SHA-256: give the one its publisher states "
                "(--sha256)."
            )
        return download(str(source), sha256, cache_dir=cache_dir)
    path = Path(source)
    if sha256 is not None:
        _require_hash(path, _hex_digest(sha256), "Use another file, or correct the hash.")
    return path


def download(url: str, sha256: str, *, cache_dir: str | Path | None = None) -> Path:
    """Download a file once. A broken-off download goes on where it stopped, also in a later call.

    No Hugging Face token is sent. Proxies, certificates and offline mode are those of `huggingface_hub`.

    Args:
        url: http(s) address; redirects are followed.
        sha256: Hex digest the file must have.
        cache_dir: Root of the cache; Hugging Face's assets cache if not given.

    Returns:
        The file, named as in the URL.

    Raises:
        ConfigurationError: The URL or the hash is none.
        TransferError: The server refused, or kept failing; what arrived is kept.
        VerificationError: The file has another hash. It was deleted.
    """
    expected = _hex_digest(sha256)
    if not is_url(url) or not urlsplit(url).hostname:
        raise ConfigurationError(f"'{public_url(url)}' is not an http(s) address.")
    folder = cached_assets_path("hf_rsheat", "downloads", expected, assets_dir=cache_dir)
    target, partial = folder / _file_name(url), folder / f"{_file_name(url)}.incomplete"
    with WeakFileLock(folder / ".lock"):  # two writers would mix their bytes
        if target.is_file() and sha256_of(target) == expected:
            logger.info("%s is here already.", target.name)
            return target
        _download_to(url, partial)
        try:
            _require_hash(partial, expected, "It was deleted: check the address, and the hash its publisher states.")
        except VerificationError:
            partial.unlink()
            raise
        os.replace(partial, target)
    return target


def _hex_digest(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text.strip()):
        raise ConfigurationError(f"'{text}' is not a SHA-256: give its 64 hexadecimal digits.")
    return text.strip().lower()


def _file_name(url: str) -> str:
    """The last part of the path, reduced to harmless characters."""
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII).lstrip(".")[-128:] or "checkpoint"


def _require_hash(path: Path, expected: str, advice: str) -> None:
    actual = sha256_of(path)
    if actual != expected:
        raise VerificationError(
            f"{path.name.removesuffix('.incomplete')} has SHA-256 {actual}, not {expected}. {advice}"
        )


def _download_to(url: str, partial: Path) -> None:
    """Fill a file with the content of a URL, from where it ends."""
    failures = 0
    while True:
        before = partial.stat().st_size if partial.is_file() else 0
        try:
            with partial.open("ab") as file:
                _receive(url, file, before)
            return
        except (HTTPError, OSError) as error:
            if partial.stat().st_size > before:
                failures = 0  # it moves on: only tries that bring nothing count
            try:
                pause(error, failures)
            except (HTTPError, OSError):
                arrived = tqdm.format_sizeof(partial.stat().st_size, "B")
                raise TransferError(
                    f"Cannot download {public_url(url)}: {reason(error)}. {arrived} arrived and are kept: run the "
                    "same command again to go on."
                ) from None  # the original quotes the whole address, which may hold credentials
            failures += 1


def _receive(url: str, file: BinaryIO, start: int) -> None:
    """Append what is missing after `start` bytes, with a progress bar."""
    # identity: a compressed answer has no length to resume at
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        if start and response.status_code == 416:  # nothing after `start`: it is complete, which the hash will tell
            return
        hf_raise_for_status(response)
        if start and response.status_code != 206:  # the server starts from the beginning
            file.truncate(0)
            start = 0
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdigit() else None
        name = _file_name(url)
        with tqdm(desc=name, total=total, initial=start, unit="B", unit_scale=True, name="hf_rsheat.download") as bar:
            for chunk in response.iter_bytes():  # as it comes: a chunk size would hold back what a cut connection loses
                file.write(chunk)
                bar.update(len(chunk))
