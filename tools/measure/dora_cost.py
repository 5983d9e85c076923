"""CPU seconds and planned memory of a step with LoRA and with DoRA, in turns.

    python tools/measure/dora_cost.py bf16

Four layers of GPT-2's width with adapters of rank 16 on all matrices, 4 sequences of 256 tokens.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace

import numpy as np

from gptc import Lora, Model
from gptc.engine.config import GPTConfig
from gptc.engine.lora import targets_named
from gptc.engine.options import Options, plan_for

N_STEPS, VOCABULARY = 9, 8192


def main(dtype: str) -> None:
    """Prints the plans, the medians, and the quartiles of the ratios."""
    config = replace(GPTConfig.preset("gpt2", vocab_size=VOCABULARY), n_layer=4)
    models = {}
    for kind in ("lora", "dora"):
        lora = Lora(16, 32.0, targets_named(config, "all"), dora=kind == "dora")
        options = Options("cpu", dtype, 2, max_batch=4, max_seq=256, lora=lora)
        plan = plan_for(config, options)
        print(
            f"{kind}: {plan.activation_bytes / 1e6:.0f} MB of activations, "
            f"{plan.total_bytes / 1e6:.0f} MB in all"
        )
        models[kind] = Model.create(
            config, device="cpu", dtype=dtype, threads=2, max_batch=4, max_seq=256, lora=lora
        )
    x = np.random.default_rng(0).integers(0, VOCABULARY, (4, 256)).astype(np.int32)
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(N_STEPS):
        for kind, model in models.items():
            begin = time.process_time()
            model.train_step(x, x, lr=1e-4)
            times[kind].append(time.process_time() - begin)
    ratios = [b / a for a, b in zip(times["lora"][1:], times["dora"][1:], strict=True)]
    for kind, each in times.items():
        print(f"{kind}: {statistics.median(each[1:]):.2f} CPU s a step")
    print("dora / lora, quartiles:", [round(q, 2) for q in statistics.quantiles(ratios, n=4)])


if __name__ == "__main__":
    main(sys.argv[1])
