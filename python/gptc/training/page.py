"""A page of HTML about runs, which needs nothing else: results, curves, samples, options."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptc.files.words import count, duration
from gptc.training.curves import Curves
from gptc.training.yardstick import Gain

_SAMPLES = 3  # of each run

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
svg { max-width: 100%; height: auto; background: #fff; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem; text-align: left; }
th { font-weight: 600; } pre { white-space: pre-wrap; } tr + tr { border-top: 1px solid #8886; }
"""


def page_of(runs: Sequence[Curves], svg: str, gains: Mapping[Path, Gain]) -> bytes:
    """A page with the results of runs, their picture, samples, and the options that differ.

    All that comes from files is escaped: names, samples, options.
    """
    names = ", ".join(run.name for run in runs)
    picture = svg[svg.index("<svg") :]
    head = ["", *(run.name for run in runs)]
    text = (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(names)}</title>\n<style>{_STYLE}</style>\n"
        f"<h1>{html.escape(names)}</h1>\n{_table([head, *_results(runs, gains)])}\n{picture}\n"
        f"{''.join(_samples(runs))}"
        f"<h2>Model</h2>\n{_table([head, *_differing(runs, 'config')])}\n"
        f"<h2>Options</h2>\n{_table([head, *_differing(runs, 'options')])}\n</html>\n"
    )
    return text.encode("utf-8", "replace")


def _results(runs: Sequence[Curves], gains: Mapping[Path, Gain]) -> Iterator[list[str]]:
    """Rows of the first table: a title, and a cell for each run."""
    lasts = [run.records[-1] for run in runs]
    bests = [run.best() for run in runs]
    yield ["steps", *(f"{last['step']:,}" for last in lasts)]
    yield ["tokens", *(count(last["tokens"]) for last in lasts)]
    yield ["time", *(duration(last["elapsed_s"]) for last in lasts)]
    yield ["training loss", *(f"{last['train_loss']:.4f}" for last in lasts)]
    finals = [run.final() for run in runs]
    for title, key in (("final validation loss", "val_loss"), ("bits per byte", "val_bpb")):
        yield [title, *(f"{last[key]:.4f}" if last and key in last else "" for last in finals)]
    if gains:
        found = [gains.get(run.folder) for run in runs]
        yield ["gain over counting", *(str(gain or "") for gain in found)]
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


def _samples(runs: Sequence[Curves]) -> Iterator[str]:
    """The last samples of each run."""
    for run in runs:
        for sample in run.samples[-_SAMPLES:]:
            title = f"{run.name}, step {sample['step']:,}"
            yield f"<h3>{html.escape(title)}</h3>\n<pre>{html.escape(sample['text'])}</pre>\n"


def _differing(runs: Sequence[Curves], table: str) -> Iterator[list[str]]:
    """The options, or the config, of one run, or the rows in which several differ."""
    each = [(run.trainer or {}).get(table, {}) for run in runs]
    for name in dict.fromkeys(name for values in each for name in values):
        cells = [str(values.get(name, "")) for values in each]
        if len(runs) == 1 or len(set(cells)) > 1:
            yield [name, *cells]


def _table(rows: list[list[str]]) -> str:
    lines = []
    for i, row in enumerate(rows):
        tags = ["th", *("th" if i == 0 else "td" for _ in row[1:])]
        cells = zip(tags, map(html.escape, row), strict=True)
        lines.append(f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for tag, cell in cells)}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"
