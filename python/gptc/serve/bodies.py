"""The body of a request, read within bounds of size and time, as JSON."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, NoReturn

from starlette.requests import ClientDisconnect

from gptc.files.limits import VARIABLE, limit
from gptc.serve.answers import ClientGone
from gptc.serve.problems import BadRequest, NotJson, TooLarge, TooSlow

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest


async def read_json(http: HttpRequest, timeout_s: float) -> Any:
    """The JSON of a body. A Problem if it is too large or slow, or not JSON in UTF-8."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Only this type makes browsers ask before they send another site's request.
        raise NotJson(
            f"the content type is {kind!r:.60}; send the header Content-Type: application/json"
        )
    try:
        data = await asyncio.wait_for(_read(http), timeout_s)
    except (asyncio.TimeoutError, TimeoutError):
        raise TooSlow(f"the body did not arrive within {timeout_s:g} seconds") from None
    except ClientDisconnect:
        raise ClientGone from None
    try:
        value = json.loads(data.decode(), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise BadRequest(f"byte {error.start} of the body is not UTF-8") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error!s:.200}") from None
    return value


async def _read(http: HttpRequest) -> bytes:
    most, data = limit("request"), bytearray()
    async for piece in http.stream():
        data += piece
        if len(data) > most:
            raise TooLarge(
                f"the body exceeds {most:,} bytes: send less, or raise the server's limit with "
                f"{VARIABLE}=request=SIZE"
            )
    return bytes(data)


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number of JSON")
