"""What uploads and downloads share: which failures pass by themselves, how long to wait, what a message may quote."""

import json
import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

logger = logging.getLogger(__name__)

T = TypeVar("T")
# 412: somebody else committed in between; the caller looks again before it repeats.
PASSING_STATUS = {408, 412, 429, 500, 502, 503, 504}
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before the second, third, ... try
LONGEST_WAIT = 300.0  # seconds; a server that asks for more is not waited for


def patiently(call: Callable[[], T]) -> T:
    """The result of a call that may be repeated without harm, through a few passing failures in a row."""
    failures = 0
    while True:
        try:
            return call()
        except (HTTPError, OSError, ValueError) as error:
            pause(error, failures)
            failures += 1


def pause(error: BaseException, failures: int) -> None:
    """Wait before the next try, or raise `error` if it does not pass or was waited for often enough.

    Args:
        failures: How often in a row the call failed before, from 0.
    """
    wait = max(_asked_wait(error), WAITS[failures]) if failures < len(WAITS) else LONGEST_WAIT + 1
    if wait > LONGEST_WAIT or not is_passing(error):
        raise error
    symptom = f"the server answered {error.response.status_code}" if isinstance(error, HfHubHTTPError) else "no answer"
    logger.warning("Try %d of %d failed (%s); next in %.0f s.", failures + 1, len(WAITS) + 1, symptom, wait)
    time.sleep(wait)


def is_passing(error: BaseException | None) -> bool:
    """Whether the same call may succeed a little later: trouble of the server, rate limits, lost connections."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING_STATUS
    if isinstance(error, LocalEntryNotFoundError):  # how the download client reports that it could not look up a file
        return is_passing(error.__cause__)
    # The client parses some answers before it looks at their status: a gateway's error page then is "no JSON".
    return isinstance(error, HTTPError | json.JSONDecodeError)


def _asked_wait(error: BaseException) -> float:
    """Seconds a server asks to wait in `Retry-After`; 0 if it does not."""
    value = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(value) if value.isdigit() else 0.0


def reason(error: BaseException, secret: str | None = None) -> str:
    """What failed, fit for a message: without credentials in addresses, and without the secret a server may echo."""
    text = str(error) or type(error).__name__
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # the upload client hides the cause
        text = f"{text} {error.__cause__}"
    text = re.sub(r"https?://[^\s'\"<>]+", lambda match: public_url(match[0]), " ".join(text.split()))
    return text.replace(secret, "<token>") if secret else text


def is_url(source: object) -> bool:
    """Whether a source is an http(s) address and not a path."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def public_url(url: str) -> str:
    """An address without user, password, query and fragment: each may be a credential."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
