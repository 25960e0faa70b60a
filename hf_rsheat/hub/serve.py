"""`hf-rsheat serve`: the hosted handler behind a small HTTP server, for people without Inference Endpoints."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rsheat.errors import MissingExtraError
from hf_rsheat.hub.export import load_folder
from hf_rsheat.hub.handler import EndpointHandler, Limits, RequestError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

WORKERS = 2  # requests decoded at a time; the model itself runs one
MAX_CONNECTIONS = 32  # more are answered with 503


def serve(
    folder: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    allow_urls: bool = False,
    limits: Limits | None = None,
) -> None:
    """Answer requests until interrupted.

    There is no password and no encryption: to let others in, put a web server that has both in front.

    Args:
        folder: A model folder; our own classes are used, never code from the folder.
        host: Address to listen on; the default is this computer only.
        port: TCP port; 0 takes any free one.
        allow_urls: Whether requests may name `https://` addresses to fetch.
        limits: What a request may cost.

    Raises:
        ConfigurationError: The folder holds no model of ours.
        MissingExtraError: starlette or uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("uvicorn", "serve", "Serving a model") from error
    model, processor = load_folder(folder)
    handler = EndpointHandler(model=model, processor=processor, allow_urls=allow_urls, limits=limits)
    uvicorn.run(create_app(handler), host=host, port=port, limit_concurrency=MAX_CONNECTIONS, log_level="info")


def create_app(handler: EndpointHandler) -> "Starlette":
    """The web application: `GET /health`, and `POST /` with JSON or with the bytes of an image.

    Beside an image (`Content-Type: image/...` or `application/octet-stream`) the parameters stand in the address:
    `curl --data-binary @scene.png -H 'Content-Type: image/png' 'http://127.0.0.1:8000/?top_k=3'`.

    Raises:
        MissingExtraError: starlette is not installed.
    """
    try:
        from anyio import CapacityLimiter, to_thread
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse
        from starlette.routing import Route
    except ImportError as error:
        raise MissingExtraError("starlette", "serve", "Serving a model") from error
    workers = CapacityLimiter(WORKERS)

    async def health(request: "Request") -> JSONResponse:
        return JSONResponse({"status": "ok", "model": type(handler.model).__name__, "modalities": handler.modalities})

    async def predict(request: "Request") -> JSONResponse:
        try:
            data = parse(request, await _body(request, handler.limits.body))
        except RequestError as error:
            answer: Any = {"error": {"status": error.status, "message": str(error)}}
        else:
            answer = await to_thread.run_sync(handler, data, limiter=workers)
        refused = isinstance(answer, dict) and "error" in answer
        return JSONResponse(answer, status_code=answer["error"]["status"] if refused else 200)

    routes = [
        Route("/health", health, methods=["GET"]),
        Route("/", health, methods=["GET"]),
        Route("/", predict, methods=["POST"]),
        Route("/predict", predict, methods=["POST"]),
    ]
    return Starlette(routes=routes)


async def _body(request: "Request", max_body: int) -> bytes:
    from starlette.requests import ClientDisconnect

    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_body:
                raise RequestError(413, f"A request may have at most {max_body} bytes.")
    except ClientDisconnect as error:
        raise RequestError(400, "The request ended too early.") from error
    return bytes(body)


def parse(request: "Request", body: bytes) -> Any:
    """What the handler takes, from a request.

    Raises:
        RequestError: Another content type, or no JSON.
    """
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type.startswith("image/") or content_type == "application/octet-stream":
        return {"inputs": body, "parameters": {name: _value(text) for name, text in request.query_params.items()}}
    if content_type != "application/json":
        raise RequestError(415, "Send application/json, or an image with its own content type.")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "The body is not JSON.") from error


def _value(text: str) -> Any:
    """`3`, `true`, `[0.5, 0.5]` as in JSON; anything else is a word."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
