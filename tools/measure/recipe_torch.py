"""nanoGPT's CPU recipe on a text, in PyTorch, to time `gptc train` against.

    pip install '.[parity]'; python tools/measure/recipe_torch.py tinyshakespeare.txt [STEPS]

4 layers, 4 heads, width 128, T 64, B 12, learning rate 1e-3 to 1e-4 (cosine, 100 warm-up steps),
evaluated every 250 steps on 20 batches of both splits.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

from gptc.bench.torch import GPT
from gptc.engine.config import GPTConfig

B, T, WARMUP = 12, 64, 100


def main(path: str, steps: int = 2000) -> None:
    text = Path(path).read_text()
    ids = {char: i for i, char in enumerate(sorted(set(text)))}
    data = torch.from_numpy(np.array([ids[char] for char in text]))
    cut = int(0.9 * len(data))
    splits = {"train": data[:cut], "val": data[cut:]}
    config = GPTConfig.preset(
        "gpt2", n_layer=4, n_head=4, n_embd=128, block_size=T, vocab_size=len(ids)
    )
    torch.manual_seed(1337)
    model = GPT(config)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))

    def batch(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = splits[split]
        starts = torch.randint(len(tokens) - T, (B,))
        rows = torch.stack([tokens[i : i + T + 1] for i in starts])
        return rows[:, :-1], rows[:, 1:]

    begin = time.perf_counter()
    for step in range(steps + 1):
        if step % 250 == 0 or step == steps:
            with torch.no_grad():
                loss = {s: sum(model(*batch(s)).item() for _ in range(20)) / 20 for s in splits}
            print(f"{step}: {loss}, {time.perf_counter() - begin:.1f} s", flush=True)
        if step == steps:
            break
        done = (step - WARMUP) / (steps - WARMUP)
        lr = 1e-3 * (step + 1) / (WARMUP + 1)
        if step >= WARMUP:
            lr = 1e-4 + 0.5 * (1 + math.cos(math.pi * done)) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = lr
        model(*batch("train")).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
