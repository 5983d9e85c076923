"""The folder of gptc's cache."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder of downloads and prepared datasets: $GPTC_CACHE, else in the user's cache."""
    if own := os.environ.get("GPTC_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if Path(xdg).is_absolute() else Path.home() / ".cache") / "gptc"
