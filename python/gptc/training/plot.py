"""Pictures of runs: an image by matplotlib, or a page of HTML that needs nothing else."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gptc.errors import GptcError
from gptc.files.whole import write_file
from gptc.files.words import count, duration, pip_install
from gptc.training.curves import Curves, smooth

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
_UNITS = {"step": "steps", "tokens": "tokens", "time": "seconds"}


def draw(runs: Sequence[Curves], out: Path, x: str = "step") -> None:
    """Writes a picture of runs; the suffix of `out` chooses its kind. x: "step", "tokens", "time".

    GptcError for another suffix, and if matplotlib is missing.
    """
    suffix = out.suffix.lower()
    if suffix not in (*IMAGES, PAGE):
        raise GptcError(f"{out} has no known suffix: use {', '.join((*IMAGES, PAGE))}")
    figure = _figure(runs, x)
    image = io.BytesIO()
    kind = "svg" if suffix == PAGE else suffix[1:]
    figure.savefig(image, format=kind, metadata={"Date": None} if kind == "svg" else None)
    data = image.getvalue()
    write_file(out, _page(runs, data.decode()).encode() if suffix == PAGE else data)


def _figure(runs: Sequence[Curves], x: str) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise GptcError(f"pictures need matplotlib: {pip_install('matplotlib')}") from None
    panels = [panel for panel in _PANELS if _has(runs, panel[1:3])]
    figure = Figure(figsize=(9, 2.4 * len(panels)), dpi=120, layout="constrained")
    for place, (title, smoothed, marked, scale) in zip(
        figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True
    ):
        for i, run in enumerate(runs):
            color = f"C{i % 10}"
            if smoothed:
                at, values = run.curve(smoothed, x)
                if len(values) > 200:
                    place.plot(at, values, color=color, alpha=0.25, linewidth=0.5)
                place.plot(at, smooth(values), color=color, linewidth=1.2, label=run.name)
            if marked:
                at, values = run.curve(marked, x)
                named = None if smoothed else run.name
                place.plot(
                    at, values, "o-" if not smoothed else "o", color=color, ms=4, label=named
                )
        place.set_title(title, loc="left", fontsize=10)
        place.set_yscale(scale)
        place.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.axes[-1].set_xlabel(_UNITS[x])
    return figure


def _has(runs: Sequence[Curves], keys: Sequence[str | None]) -> bool:
    return any(key in record for run in runs for record in run.records for key in keys if key)


# ---- the page ----

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
svg { max-width: 100%; height: auto; background: #fff; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem; text-align: left; }
th { font-weight: 600; } tr + tr { border-top: 1px solid #8886; }
"""


def _page(runs: Sequence[Curves], svg: str) -> str:
    """A page with the picture, the results of each run, and the options in which they differ."""
    names = ", ".join(run.name for run in runs)
    picture = svg[svg.index("<svg") :]
    rows = [["", *(run.name for run in runs)]]
    rows += [[title, *cells] for title, *cells in _results(runs)]
    options = [["option", *(run.name for run in runs)], *_options(runs)]
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(names)}</title>\n<style>{_STYLE}</style>\n"
        f"<h1>{html.escape(names)}</h1>\n{_table(rows)}\n{picture}\n"
        f"<h2>Options</h2>\n{_table(options)}\n</html>\n"
    )


def _results(runs: Sequence[Curves]) -> Iterator[list[str]]:
    """Rows of the first table: a title, and a cell for each run."""
    lasts = [run.records[-1] for run in runs]
    bests = [run.best() for run in runs]
    yield ["steps", *(f"{last['step']:,}" for last in lasts)]
    yield ["tokens", *(count(last["tokens"]) for last in lasts)]
    yield ["time", *(duration(last["elapsed_s"]) for last in lasts)]
    yield ["training loss", *(f"{last['train_loss']:.4f}" for last in lasts)]
    for title, key in (("best validation loss", "val_loss"), ("its bits per byte", "val_bpb")):
        yield [title, *(f"{best[key]:.4f}" if best and key in best else "" for best in bests)]
    yield ["at step", *(f"{best['step']:,}" if best else "" for best in bests)]
    machines = [_machine(run.trainer) if run.trainer else "" for run in runs]
    yield ["machine", *machines]


def _machine(trainer: dict[str, Any]) -> str:
    if "options" not in trainer:
        return ""
    level = f" ({trainer['cpu_level']})" if trainer["device"] == "cpu" else ""
    return f"{trainer['device']}{level}, {trainer['threads']} threads, {trainer['dtype']}"


def _options(runs: Sequence[Curves]) -> Iterator[list[str]]:
    """The options of one run, or those in which several differ."""
    each = [(run.trainer or {}).get("options", {}) for run in runs]
    for name in dict.fromkeys(name for options in each for name in options):
        cells = [str(options.get(name, "")) for options in each]
        if len(runs) == 1 or len(set(cells)) > 1:
            yield [name, *cells]


def _table(rows: list[list[str]]) -> str:
    lines = []
    for i, row in enumerate(rows):
        tags = ["th", *("th" if i == 0 else "td" for _ in row[1:])]
        cells = zip(tags, map(html.escape, row), strict=True)
        lines.append(f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for tag, cell in cells)}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"
