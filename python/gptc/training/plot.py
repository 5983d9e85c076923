"""Pictures of runs: an image by matplotlib, or a page of HTML that needs nothing else."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptc.errors import GptcError
from gptc.files.whole import check_place, write_file
from gptc.files.words import pip_install
from gptc.training.curves import Curves, smooth
from gptc.training.page import page_of
from gptc.training.ratios import PREFIX
from gptc.training.yardstick import Gain

IMAGES = (".png", ".svg", ".pdf")
PAGE = ".html"

# Title, key of the smoothed curve, key of the marked one, kind of axis.
_PANELS = (
    ("loss (nats per token)", "train_loss", "val_loss", "linear"),
    ("validation, bits per byte", None, "val_bpb", "linear"),
    ("margin of rewards", "reward_margin", "val_margin", "linear"),
    ("share of pairs with a positive margin", "reward_accuracy", "val_accuracy", "linear"),
    ("reward of chosen answers", "reward_chosen", None, "linear"),
    ("reward of rejected answers", "reward_rejected", None, "linear"),
    ("learning rate", "lr", None, "linear"),
    ("gradient norm", "grad_norm", None, "log"),
    ("tokens per second", "tokens_per_s", None, "linear"),
)
_RATIOS = "update / weights, by kind of matrix"
_UNITS = {"step": "steps", "tokens": "tokens", "time": "seconds"}


def draw(
    runs: Sequence[Curves], out: Path, x: str = "step", gains: Mapping[Path, Gain] | None = None
) -> None:
    """Writes a picture of runs; the suffix of `out` chooses its kind. x: "step", "tokens", "time".

    A page of HTML also has `gains`, those of runs' folders over counting.

    GptcError for another suffix, and if matplotlib is missing.
    """
    suffix = check_out(out)
    figure = _figure(runs, x)
    image = io.BytesIO()
    kind = "svg" if suffix == PAGE else suffix[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font lacks
        figure.savefig(image, format=kind, metadata={"Date": None} if kind == "svg" else None)
    data = image.getvalue()
    write_file(out, page_of(runs, data.decode(), gains or {}) if suffix == PAGE else data)


def check_out(out: Path, kinds: Sequence[str] = (*IMAGES, PAGE), option: str = "--out") -> str:
    """The suffix of a picture, which is one of `kinds`; `option` gave its path.

    GptcError for another suffix, without matplotlib, and if it cannot be written.
    """
    suffix = out.suffix.lower()
    if suffix not in kinds:
        raise GptcError(f"{option} {out} does not end with a known suffix: use {', '.join(kinds)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise GptcError(f"pictures need matplotlib: {pip_install('matplotlib')}") from None
    try:
        check_place(out)
    except OSError as error:
        raise GptcError(
            f"cannot write {out} ({error.strerror}): choose another file with {option}"
        ) from None
    return suffix


def _figure(runs: Sequence[Curves], x: str) -> Any:
    from matplotlib.figure import Figure

    panels = [panel for panel in _PANELS if _has(runs, panel[1:3])]
    ratios = list(dict.fromkeys(key for run in runs for r in run.records for key in _ratios(r)))
    n = len(panels) + bool(ratios)
    figure = Figure(figsize=(9, 2.4 * n), dpi=120, layout="constrained")
    places = figure.subplots(n, sharex=True, squeeze=False)[:, 0]
    if ratios:
        _draw_ratios(places[-1], runs, ratios, x)
    for place, (title, smoothed, marked, scale) in zip(places, panels, strict=False):
        for i, run in enumerate(runs):
            color = f"C{i % 10}"
            if smoothed:
                at, values = run.curve(smoothed, x)
                if len(values) > 200:
                    place.plot(at, values, color=color, alpha=0.25, linewidth=0.5)
                place.plot(at, smooth(values), color=color, linewidth=1.2, label=_label(run.name))
            if marked:
                at, values = run.curve(marked, x)
                named = None if smoothed else _label(run.name)
                place.plot(
                    at, values, "o-" if not smoothed else "o", color=color, ms=4, label=named
                )
        place.set_title(title, loc="left", fontsize=10)
        place.set_yscale(scale)
        place.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.axes[-1].set_xlabel(_UNITS[x])
    return figure


def _ratios(record: Mapping[str, Any]) -> list[str]:
    return [key for key in record if key.startswith(PREFIX)]


def _draw_ratios(place: Any, runs: Sequence[Curves], keys: Sequence[str], x: str) -> None:
    """A line for each kind of matrix; the same in all runs has one style."""
    styles = ("-", "--", "-.", ":")
    for i, run in enumerate(runs):
        for j, key in enumerate(keys):
            at, values = run.curve(key, x)
            color = f"C{(i if len(runs) > 1 else j) % 10}"
            style = styles[j % 4] if len(runs) > 1 else "-"
            label = None if i else _label(key.removeprefix(PREFIX))
            place.plot(at, values, style, color=color, marker=".", linewidth=1, label=label)
    place.set_title(_RATIOS, loc="left", fontsize=10)
    place.set_yscale("log")
    place.grid(alpha=0.3)
    place.legend(fontsize=7, ncols=3)


def _label(name: str) -> str:
    """A name as matplotlib shows it: no formula between dollars, nor hidden by an underscore."""
    shown = name.replace("$", r"\$").encode("utf-8", "replace").decode()
    return " " + shown if shown.startswith("_") else shown


def _has(runs: Sequence[Curves], keys: Sequence[str | None]) -> bool:
    return any(key in record for run in runs for record in run.records for key in keys if key)
