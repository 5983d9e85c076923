"""Numbers in words: bytes, counts, durations; and words of a command, as a shell reads them."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from pathlib import Path

DAY_S = 24 * 60 * 60


def duration(seconds: float) -> str:
    """A duration such as "0:42", "12:03", "3:05:00" or "52 days"; "?" if unknown."""
    if not 0 <= seconds < math.inf:
        return "?"
    if seconds >= DAY_S:
        return f"{few(seconds / DAY_S)} days"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def span(seconds: float) -> str:
    """A short duration in a unit that suits it: "0.35 ms", "812 ms", "8.4 s", "24:57"."""
    if seconds < 1:
        return f"{few(1e3 * seconds)} ms"
    return f"{few(seconds)} s" if seconds < 100 else duration(seconds)


def amount(n_bytes: float) -> str:
    """A number of bytes, in powers of 1000: "850 B", "12.3 MB", "1.4 GB"."""
    value, unit = float(n_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def count(n: float) -> str:
    """A count, in powers of 1000: "812", "12.3K", "4.1M", "124M"."""
    value, unit = float(n), ""
    for larger in ("K", "M", "G", "T"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f}{unit}" if not unit or value >= 100 else f"{value:.1f}{unit}"


def few(x: float) -> str:
    """A number with two digits, or rounded to an integer: "0.035", "2.8", "4,300"."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def plural(n: int, noun: str, several: str | None = None) -> str:
    """A number and its noun, such as "1 layer" or "12 layers"."""
    return f"{n:,} {noun if n == 1 else several or noun + 's'}"


def quoted(word: str | Path) -> str:
    """A word of a printed command: `'a b'`, or `$'\\xff'` for bytes that cannot be printed."""
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t"}
    return "$'" + "".join(escapes.get(c, c if c.isprintable() else _escaped(c)) for c in text) + "'"


def pip_install(*packages: str) -> str:
    """The command that installs packages for this Python, also where `pip` is that of another."""
    pip = shutil.which("pip")
    ours = pip is not None and Path(pip).parent == Path(sys.executable).parent
    program = "pip" if ours else f"{quoted(sys.executable)} -m pip"
    return f"{program} install {' '.join(packages)}"


def _escaped(character: str) -> str:
    """The bytes of a character, or the byte of a file name that is not UTF-8."""
    errors = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", errors))
