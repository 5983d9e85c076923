"""The constants of --depth: losses by learning rate, batch, context and tokens at several depths.

    python tools/measure/depth.py --data ch --out /tmp/depth --table rates

Each row is a run of `gptc train` with one thread; losses do not depend on the machine's load. The
table `rates` varies the learning rate, `batches` the batch and `sizes` the depth at equal FLOPs;
`stories` (with --data stories) has sizes and steps around the recipe of that name. Runs that are
there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gptc.training.depth import by_depth

Row = Mapping[str, Any]


def shape(depth: int, rate: float, tokens: int, rows: int, seq_len: int) -> dict[str, Any]:
    """The options of a run: those of a depth, but with the rest as given."""
    chosen = by_depth(depth, {"seq_len": seq_len})
    own = {"lr": rate, "tokens": tokens, "batch_size": rows}
    return {name: value for name, value in (chosen | own).items() if name != "epochs"}


def flops(depth: int) -> float:
    """FLOPs of a token in training, about: six for each number of the matrices of layers."""
    one = by_depth(depth, {})
    matrices = 4 * one["n_embd"] ** 2 + 3 * one["n_embd"] * one["n_ff"]
    return 6.0 * depth * (matrices + one["n_embd"] * one["seq_len"]) + 6 * 65 * one["n_embd"]


def rows_of(table: str) -> list[Row]:
    """The runs of a table."""
    if table == "rates":
        rates = {
            1: (8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
            2: (4e-3, 8e-3, 1.6e-2),
            3: (4e-3, 8e-3, 1.6e-2),
        }
        tokens = {1: 500_000, 2: 500_000, 3: 375_000}
        return [
            shape(depth, rate, tokens[depth], 8, 128 * depth)
            for depth in rates
            for rate in rates[depth]
        ]
    if table == "batches":
        batches = ((8, 128, 8e-3), (16, 128, 8e-3), (16, 128, 1.6e-2), (32, 128, 1.6e-2))
        return [shape(2, rate, 500_000, rows, length) for rows, length, rate in batches]
    if table == "stories":
        sizes = ((2, 96, 150), (2, 96, 300), (2, 96, 600), (4, 96, 150), (4, 96, 300), (1, 96, 300))
        sizes += ((1, 96, 900), (2, 64, 600))
        own = {"lr": 8e-3, "schedule": "linear", "batch_size": 8, "seq_len": 160}
        return [
            {"preset": "modern", **own, "n_layer": n_layer, "n_embd": width, "n_head": width // 32}
            | {"n_ff": 8 * width // 3 // 64 * 64, "tokens": steps * 1280}
            for n_layer, width, steps in sizes
        ]
    found: list[Row] = []
    for budget, depths in {2.5e11: (1, 2), 1e12: (1, 2, 3), 4e12: (2, 3)}.items():
        for depth in depths:
            one = by_depth(depth, {})
            equal = 1000 * round(budget / flops(depth) / 1000)
            found.append(shape(depth, one["lr"], equal, one["batch_size"], one["seq_len"]))
    return found


def loss_of(out: Path, data: str, row: Row) -> float:
    """The validation loss after a run, in nats per token."""
    parts = ("n_layer", "n_embd", "batch_size", "seq_len", "tokens", "lr")
    name = "-".join(f"{row[key]:.9g}" for key in parts)
    run = out / name
    result = run / "result.json"
    if not result.exists():
        shutil.rmtree(run, ignore_errors=True)  # of a run that was stopped
        words = [word for key in row for word in (f"--{key.replace('_', '-')}", str(row[key]))]
        command = [
            *(sys.executable, "-m", "gptc", "train", "--data", data, *words, "--seed", "1"),
            *("--eval-every", "1000000", "--eval-batches", "0", "--threads", "1"),
            *("--out", str(run), "--json"),
        ]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        result.write_text(ran.stdout)
    found = json.loads(result.read_text())
    print(
        f"{row['n_layer']} x {row['n_embd']}, {row['batch_size']} x {row['seq_len']} tokens, "
        f"lr {row['lr']:g}, {row['tokens']:,} tokens, {found['steps']:,} steps: "
        f"{found['val_loss']:.4f}, {found['val_bpb']:.4f} bits per byte",
        flush=True,
    )
    return float(found["val_loss"])


def main() -> None:
    """Prints the loss of each run of a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="characters of tinyshakespeare, prepared")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs")
    parser.add_argument("--table", choices=["rates", "batches", "sizes", "stories"], required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in pool.map(
            lambda row: loss_of(options.out, options.data, row), rows_of(options.table)
        ):
            pass


if __name__ == "__main__":
    main()
