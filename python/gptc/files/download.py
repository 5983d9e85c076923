"""Downloads that survive lost connections: resumed, retried with back-off, verified.

    download("https://host/file.txt", Path("file.txt"), sha256="86c4...")

`file.txt.partial` holds an incomplete download; the next call resumes it. Proxies come from the
environment (HTTPS_PROXY, NO_PROXY), as in other programs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote

from gptc.errors import GptcError, without_secrets
from gptc.files.checksum import file_sha256
from gptc.files.limits import limit, refuse
from gptc.files.whole import remove

if TYPE_CHECKING:
    import requests

ProgressCallback: TypeAlias = Callable[[str, int, int | None], None]
"""Called as progress(action, bytes done, bytes in all or None if unknown)."""

_BLOCK_BYTES = 1 << 16
_FIRST_WAIT_S = 1.0  # before the second attempt; doubled before each further one
_LONGEST_WAIT_S = 60.0
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses worth a retry


_ETAG = re.compile(r'"[\x21\x23-\x7e]*"')


class _Again(Exception):
    """A failed attempt that is worth a retry. The text is the reason."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    n_bytes: int | None = None,
    progress: ProgressCallback | None = None,
    timeout_s: float = 30,
    attempts: int = 5,
) -> None:
    """Downloads `url` to `path`, which appears complete and verified or not at all.

    Resumes an earlier call that was cut off. `timeout_s` is the longest silence of the server,
    `attempts` the number of requests in a row that may bring no new bytes. Raises GptcError if the
    download fails, OSError if the disk does.
    """
    partial = path.with_name(f"{path.name}.partial")
    validator = path.with_name(f"{path.name}.etag")
    report = progress or (lambda action, n_done, n_all: None)
    n_failed, restarted = 0, False
    while True:
        n_before = _size(partial)
        try:
            _attempt(url, partial, validator, report, timeout_s)
            n_done = _size(partial)
            if n_bytes is not None and n_done != n_bytes:
                raise _unexpected(url, f"it has {n_done} bytes instead of {n_bytes}", partial)
            if sha256 is not None and file_sha256(partial) != sha256:
                if n_before and not restarted:  # the earlier partial file may be the damaged part
                    restarted = True
                    remove(partial)
                    continue
                raise _unexpected(url, "it has the wrong SHA-256", partial)
            partial.replace(path)
            remove(validator)
            return
        except _Again as e:
            n_failed = n_failed + 1 if _size(partial) <= n_before else 1
            if n_failed >= attempts:
                raise _error(url, str(e)) from None
            time.sleep(min(max(e.wait_s, _FIRST_WAIT_S * 2 ** (n_failed - 1)), _LONGEST_WAIT_S))


def get_json(url: str, timeout_s: float = 30) -> tuple[Any, str | None]:
    """The JSON at `url`, and the address of its next page or None."""
    import requests
    from urllib3.exceptions import HTTPError

    for attempt in range(3):
        try:
            reply = requests.get(url, timeout=timeout_s, headers={"User-Agent": "gptc"})
            if reply.status_code not in _PASSING:
                break
        except (requests.RequestException, HTTPError, UnicodeError) as e:
            if attempt == 2 or _is_permanent(e):
                raise _error(url, _reason(e)) from None
        time.sleep(_FIRST_WAIT_S * 2**attempt)
    if not reply.ok:
        raise _error(url, f"HTTP {reply.status_code} {reply.reason}")
    try:
        return reply.json(), reply.links.get("next", {}).get("url")
    except ValueError:
        raise _error(url, "the answer is not JSON") from None


def _attempt(
    url: str, partial: Path, validator: Path, report: ProgressCallback, timeout_s: float
) -> None:
    """One request for the missing part of `partial`. Raises _Again if a retry may help."""
    import requests
    from urllib3.exceptions import HTTPError

    shown = without_secrets(url)
    etag = _stored_etag(validator)
    if etag is None:  # damaged: the bytes may be of another version
        partial.unlink(missing_ok=True)
        validator.unlink()
    n_done, most = _size(partial), limit("stream")
    headers = {"User-Agent": "gptc", "Accept-Encoding": "identity"}
    if n_done:
        headers["Range"] = f"bytes={n_done}-"
        if etag:  # a newer version of the file must not be appended
            headers["If-Range"] = etag
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout_s) as reply:
            if reply.status_code == 416 and n_done:
                held = reply.headers.get("Content-Range", "")
                total = re.fullmatch(r"bytes \*/([0-9]{1,18})", held)
                if total and int(total[1]) == n_done:
                    return
                remove(partial)
                raise _Again("the server has fewer bytes than it sent before")
            if reply.status_code in _PASSING:
                raise _Again(_status(reply), _retry_after(reply))
            if not reply.ok:
                raise _error(url, _status(reply))
            sent = re.match(r"bytes ([0-9]{1,18})-", reply.headers.get("Content-Range", ""))
            resumed = reply.status_code == 206 and sent is not None and int(sent[1]) == n_done
            if reply.status_code == 206 and not resumed:
                remove(partial)
                raise _Again("the server sent the wrong part of the file")
            n_done = n_done if resumed else 0
            length = reply.headers.get("Content-Length", "")
            n_all = n_done + int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
            etag = reply.headers.get("ETag", "")
            if _ETAG.fullmatch(etag):  # a weak ETag does not identify the bytes
                validator.write_text(etag)
            elif not resumed:
                remove(validator)
            with partial.open("ab" if resumed else "wb") as file:
                for block in reply.raw.stream(_BLOCK_BYTES, decode_content=False):
                    file.write(block)
                    n_done += len(block)
                    if n_done > most:
                        raise refuse(shown, "stream", "download what is needed by other means")
                    report(f"downloading {shown}", n_done, n_all)
            if n_all is not None and n_done < n_all:
                raise _Again(f"the connection ended after {n_done} of {n_all} bytes")
    except (requests.RequestException, HTTPError, UnicodeError) as e:
        if _is_permanent(e):
            raise _error(url, _reason(e)) from None
        have = _size(partial)
        cut = have and "IncompleteRead" in repr(e) and n_all is not None
        raise _Again(
            f"the connection ended after {have} of {n_all} bytes" if cut else _reason(e)
        ) from None


def _stored_etag(validator: Path) -> str | None:
    """The ETag of an incomplete download, "" without one; None for a file that holds no ETag."""
    if not validator.is_file():
        return ""
    etag = validator.read_bytes().decode("latin-1")
    return etag if _ETAG.fullmatch(etag) else None


def _is_permanent(error: BaseException) -> bool:
    """Whether the same request would fail again: an address, a certificate, endless redirects."""
    from requests import exceptions as known
    from urllib3.exceptions import LocationParseError

    if isinstance(error, known.SSLError):
        return "CERTIFICATE_VERIFY_FAILED" in repr(error) or "doesn't match" in repr(error)
    # InvalidURL and InvalidSchema are ValueErrors; so is a JSON error, which cannot occur here.
    kinds = (ValueError, LocationParseError, known.TooManyRedirects, known.InvalidHeader)
    return isinstance(error, kinds)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _status(reply: requests.Response) -> str:
    return f"HTTP {reply.status_code} {reply.reason}"


def _retry_after(reply: requests.Response) -> float:
    after = reply.headers.get("Retry-After", "")
    return float(after) if after.isdecimal() else 0.0


def _reason(e: BaseException) -> str:
    """The innermost cause of a client's nested errors."""
    inner: Any = e
    for _ in range(8):
        args = getattr(inner, "args", ())
        deeper = getattr(inner, "reason", None) or next(
            (arg for arg in args if isinstance(arg, BaseException)), None
        )
        if not isinstance(deeper, BaseException):
            break
        inner = deeper
    text = getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
    return re.sub(r"^.*?Connection\w*\([^)]*\)[:,] ", "", text)


def _unexpected(url: str, why: str, partial: Path) -> GptcError:
    remove(partial)
    return _error(url, why)


def _error(url: str, why: str) -> GptcError:
    if any(secret in why for secret in _secrets(url)):
        why = "not a valid address"
    url = without_secrets(url)
    return GptcError(
        f"cannot download {url} ({why}): check the address and the network, or download the file "
        "by other means and give its path"
    )


def _secrets(url: str) -> list[str]:
    """The parts of an address that no message may quote."""
    host = url.partition("//")[2].partition("/")[0]
    user, at, _ = host.rpartition("@")
    if not at and "@" in url:
        user = host  # of a password with a slash
    found = [user, user.partition(":")[2], url.partition("?")[2], url.partition("#")[2]]
    return [part for part in [*found, *map(unquote, found)] if len(part) > 2]
