"""The folder of gptc's cache."""

from __future__ import annotations

import os
from pathlib import Path

from gptc.errors import GptcError

ANOTHER_CACHE = "set GPTC_CACHE to a folder that can be written"


def cache_folder() -> Path:
    """The folder of downloads and prepared datasets: $GPTC_CACHE, else in the user's cache.

    GptcError without a home folder.
    """
    try:
        if own := os.environ.get("GPTC_CACHE"):
            return Path(own).expanduser()
        xdg = os.environ.get("XDG_CACHE_HOME", "")
        return (Path(xdg) if Path(xdg).is_absolute() else Path.home() / ".cache") / "gptc"
    except RuntimeError:
        raise GptcError(f"there is not a home folder for the cache: {ANOTHER_CACHE}") from None


def cache_advice(path: Path | str) -> str:
    """What to do about a failure at a path on the way to the cache or in it; "" elsewhere."""
    try:
        cache = cache_folder()
    except GptcError:
        return ""
    failed = Path(path)
    near = failed == cache or cache in failed.parents or failed in cache.parents
    return f", or {ANOTHER_CACHE}" if near else ""
