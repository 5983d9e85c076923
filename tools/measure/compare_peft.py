"""Compares a training step of adapters in gptc and in transformers with peft: time and memory.

    pip install torch transformers peft
    gptc export -m model.gguf --to hf --dtype bf16 --out model-hf
    python tools/measure/compare_peft.py model.gguf model-hf --dtype packed --recompute mlp

Each program runs in its own process, which the parent lets take a step in turn, so that both meet
the same machine. A step is forward, backward, clipping and AdamW of adapters of all linear layers.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

VOCABULARY = 30_000  # random tokens below it
PROJECTIONS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj c_attn c_proj c_fc"


def batch(options: argparse.Namespace) -> tuple[Any, Any]:
    """Tokens and targets of a step, (B, T); -1 is a position without a target."""
    rng = np.random.default_rng(1)
    rows = rng.integers(0, VOCABULARY, (options.batch, options.seq_len + 1)).astype(np.int32)
    targets = rows[:, 1:].copy()
    targets[:, : round(options.seq_len * (1 - options.targets))] = -1
    return rows[:, :-1], targets


def ours(options: argparse.Namespace) -> Callable[[], float]:
    """A step of gptc."""
    from gptc.checkpoint.facade import load_model
    from gptc.checkpoint.find import open_checkpoint
    from gptc.engine.lora import Lora, adapters_of

    file = open_checkpoint(options.model)
    lora = None
    if options.rank:
        lora = Lora(options.rank, 2.0 * options.rank, adapters_of(file.config))
    model = load_model(
        file,
        dtype=options.dtype,
        threads=options.threads,
        training=True,
        max_batch=options.batch,
        max_seq=options.seq_len,
        recompute=options.recompute,
        recompute_layers=options.recompute_layers,
        optimizer_dtype=options.optimizer_dtype,
        lora=lora,
    )
    if lora:
        model.init_adapters(1)  # zeros would learn nothing
    tokens, targets = batch(options)
    return lambda: model.train_step(tokens, targets, lr=2e-4, weight_decay=0.0).loss


def theirs(options: argparse.Namespace) -> Callable[[], float]:
    """A step of transformers with peft."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if options.peft_dtype == "bf16" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(options.folder, dtype=dtype)
    if options.rank:
        from peft import LoraConfig, get_peft_model

        there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        targets = [name for name in PROJECTIONS.split() if name in there]
        model = get_peft_model(
            model, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=targets)
        )
    run = torch.compile(model) if options.compile else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)
    tokens, targets = (torch.from_numpy(part).long() for part in batch(options))

    def step() -> float:
        logits = run(tokens).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def serve(pipe: Connection, options: argparse.Namespace, is_ours: bool) -> None:
    """Takes a step for each message; answers with loss, seconds, CPU seconds and memory."""
    step = (ours if is_ours else theirs)(options)
    while pipe.recv():
        begin, cpu = time.perf_counter(), time.process_time()
        loss = step()
        seconds = (time.perf_counter() - begin, time.process_time() - cpu)
        pipe.send((loss, *seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("--rank", type=int, default=16, help="0 = all parameters are trained")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument(
        "--targets",
        type=float,
        default=1.0,
        help="share of the tokens that have a target: the last of each row",
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bf16", help="of gptc")
    parser.add_argument("--recompute", default="none", help="of gptc")
    parser.add_argument("--recompute-layers", type=int, default=0, help="of gptc")
    parser.add_argument("--optimizer-dtype", default="fp32", help="of gptc")
    parser.add_argument(
        "--peft-dtype",
        choices=["bf16", "fp32"],
        default="bf16",
        help="of peft; fp32 is faster on a CPU that does not multiply bf16",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    options = parser.parse_args()

    context, pipes = get_context("spawn"), []
    for is_ours in (True, False):
        mine, other = context.Pipe()
        context.Process(target=serve, args=(other, options, is_ours), daemon=True).start()
        pipes.append(mine)
    found: list[list[Any]] = [[], []]
    for i in range(options.steps + 1):  # the first makes plans and caches
        for side, pipe in enumerate(pipes):
            pipe.send(True)
            answer = pipe.recv()
            if i:
                found[side].append(answer)
    for pipe in pipes:
        pipe.send(False)
    n_tokens = options.batch * options.seq_len
    medians = [[statistics.median(column) for column in zip(*rows, strict=True)] for rows in found]
    for name, (loss, seconds, cpu, memory) in zip(("gptc", "peft"), medians, strict=True):
        speed = f"{n_tokens / seconds:.1f} tokens/s, {seconds:.2f} s and {cpu:.2f} CPU s a step"
        print(f"{name}: {speed}, peak {memory / 1e6:,.0f} MB, loss {loss:.3f}")
    ratios = [theirs[1] / ours[1] for ours, theirs in zip(*found, strict=True)]
    memory = medians[1][3] / medians[0][3]
    print(f"gptc is {statistics.median(ratios):.2f} times as fast, in 1/{memory:.1f} of the memory")


if __name__ == "__main__":
    main()
