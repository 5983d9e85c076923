"""Shows when the sums of gradients begin and end during the backward pass of each rank.

    mpirun -n 2 --bind-to none python tools/measure/overlap.py --preset gpt2 --batch-size 4

Each rank has random tokens and one thread. Rank 0 prints a line for each sum of the last step, and
the share of the sums' time that the pass hides; `--json` prints all ranks' spans instead.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from gptc import GPTConfig
from gptc.engine.model import Model, Share
from gptc.engine.world import SumSpan, World, join


def last_step(world: World, asked: argparse.Namespace) -> list[SumSpan]:
    """The sums of the last of some steps."""
    config = GPTConfig.preset(asked.preset, vocab_size=asked.vocab_size)
    rng = np.random.default_rng(world.rank)
    B, T = asked.batch_size, asked.seq_len
    sizes = {"max_batch": B, "max_seq": T}
    with Model.create(config, device="cpu", dtype=asked.dtype, threads=1, **sizes) as model:
        share = Share(
            B * T * world.size,
            [(0, B * world.rank)],
            meet=lambda: world.add_gradients(model),
            begin=lambda: world.begin_gradients(model),
        )
        for _ in range(asked.steps):
            x, y = rng.integers(0, config.vocab_size, (2, B, T), dtype=np.int32)
            model.train_step([x], [y], lr=1e-4, share=share)
    return world.spans()


def hidden(spans: list[SumSpan]) -> float:
    """The share of the sums' time before backward ends, when the last one is ready."""
    ended = spans[-1].ready_s
    before = sum(max(0.0, min(s.end_s, ended) - s.begin_s) for s in spans)
    return before / sum(s.end_s - s.begin_s for s in spans)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    asked, world = parser.parse_args(), join()
    if world.size == 1:
        parser.error("start several ranks: mpirun -n 2 python tools/measure/overlap.py")
    with world.ending_together():
        every: list[Any] = world.gather_json([s._asdict() for s in last_step(world, asked)])
    if world.rank:
        return
    if asked.json:
        print(json.dumps(every))
        return
    spans = [SumSpan(**s) for s in every[0]]
    print("numbers   ready s   begin s     end s")
    for s in spans:
        print(f"{s.n:>10,} {s.ready_s:>8.3f} {s.begin_s:>9.3f} {s.end_s:>9.3f}")
    print(
        f"backward ends at {spans[-1].ready_s:.3f} s, the sums at {spans[-1].end_s:.3f} s; "
        f"{hidden(spans):.0%} of their time is before"
    )


if __name__ == "__main__":
    main()
