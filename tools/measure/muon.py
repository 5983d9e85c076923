"""Muon against AdamW: the share of AdamW's steps in which Muon reaches its loss.

    python tools/measure/muon.py --out /tmp/muon

Both train the same model, of GPT-2's shape, on the same batches. First each has as many runs at
other learning rates, with one seed: AdamW of --steps steps, Muon of 70 % of them.
Then, at the best rate and with other seeds, AdamW has those steps and Muon shares of them, each
with a whole schedule. Losses do not depend on the machine's load. Runs that are there are not
repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SHAPE = ["--preset", "gpt2", "--n-layer", "4", "--n-head", "4", "--n-embd", "128"]
BATCH = ["--seq-len", "128", "--batch-size", "16", "--grad-accum", "1", "--schedule", "linear"]
RATES = {"adamw": [1e-3, 2e-3, 4e-3, 8e-3, 16e-3], "muon": [2e-3, 4e-3, 8e-3, 16e-3, 32e-3]}
SHARES, TUNED_AT = (0.2, 0.3, 0.4), 0.7
TUNED_WITH, SEEDS = 1, (2, 3)


def loss_of(out: Path, optimizer: str, steps: int, rate: float, seed: int) -> float:
    """The validation loss after a run, in nats per token."""
    run = out / f"{optimizer}-{steps}-{rate:g}-{seed}"
    result = run / "result.json"
    if not result.exists():
        command = [
            *(sys.executable, "-m", "gptc", "train", "--data", "stories", *SHAPE, *BATCH),
            *("--optimizer", optimizer, "--lr", str(rate), "--steps", str(steps)),
            *("--warmup-share", "0.1", "--eval-every", str(steps), "--eval-batches", "0"),
            *("--seed", str(seed), "--threads", "1", "--out", str(run), "--json"),
        ]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        result.write_text(ran.stdout)
    loss = float(json.loads(result.read_text())["val_loss"])
    print(f"{optimizer}, {steps} steps, lr {rate:g}, seed {seed}: {loss:.4f}", flush=True)
    return loss


def share_reached(wanted: float, shares: Sequence[float], losses: Sequence[float]) -> float:
    """The share of steps at which the loss is `wanted`, by lines between those measured.

    Infinity where no share reaches it; the smallest where that is enough.
    """
    if losses[0] <= wanted:
        return shares[0]
    for i in range(1, len(shares)):
        if losses[i] <= wanted:
            part = (losses[i - 1] - wanted) / (losses[i - 1] - losses[i])
            return shares[i - 1] + part * (shares[i] - shares[i - 1])
    return math.inf


def main() -> None:
    """Prints each loss, then the share by seed and its median."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for runs")
    parser.add_argument("--steps", type=int, default=400, help="AdamW's steps")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:

        def losses(optimizer: str, runs: Iterable[tuple[int, float, int]]) -> list[float]:
            return list(pool.map(lambda run: loss_of(options.out, optimizer, *run), runs))

        best = {}
        for optimizer, rates in RATES.items():
            steps = round(options.steps * (TUNED_AT if optimizer == "muon" else 1))
            found = losses(optimizer, [(steps, rate, TUNED_WITH) for rate in rates])
            best[optimizer] = rates[found.index(min(found))]
            print(f"{optimizer}: best of {len(rates)} rates {best[optimizer]:g}", flush=True)
        wanted = losses("adamw", [(options.steps, best["adamw"], seed) for seed in SEEDS])
        steps_of = [round(share * options.steps) for share in SHARES]
        pairs = [(steps, best["muon"], seed) for seed in SEEDS for steps in steps_of]
        found = losses("muon", pairs)
    reached = []
    for i, seed in enumerate(SEEDS):
        own = found[i * len(SHARES) : (i + 1) * len(SHARES)]
        reached.append(share_reached(wanted[i], SHARES, own))
        print(f"seed {seed}: {reached[-1]:.2f} of AdamW's steps", flush=True)
    print(f"median of {len(SEEDS)} seeds: {statistics.median(reached):.2f}")


if __name__ == "__main__":
    main()
