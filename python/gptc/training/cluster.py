"""Predicted steps of several ranks: compute as measured here, messages by a formula.

A rank computes 1/N of a step's passes, as fast as this process. Sums of n bytes take (N - 1)/N n /
link for a rank's part, as much for the copies of all parts, and two latencies (csrc/comm/). At most
`WINDOW` bytes are under way in a latency, and frames of Ethernet have headers. Gradients of
products are added while the last backward pass of a rank computes, which is two thirds of the pass:
those of some layers at a time, one sum after the other. Those of a tied embedding, norms and biases
begin when it has ended. With a sharded state, that is half of the sums, and then parameters come
back. A step also adds the loss, and tells the news, such as signals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from gptc.engine.config import GPTConfig
from gptc.engine.options import Options, Plan, plan_for
from gptc.errors import UsageError
from gptc.files.words import amount, plural, span
from gptc.training.diloco import MOST_NUMBERS, outer_bytes
from gptc.training.plan import Costs
from gptc.training.setup import Setup

ETHERNET = 1448 / 1514
"""The share of data in a frame of 1,500 bytes: others are headers of Ethernet, IP and TCP."""
_RATES = {"100M": 1e8, "1G": 1e9, "10G": 1e10, "100G": 1e11}
LINKS = {**{name: bits / 8 * ETHERNET for name, bits in _RATES.items()}, "nvlink": 450e9}
"""Bytes a second that a rank sends; NVLink's of the fourth generation."""
SYNC_EVERY = 50  # of DiLoCo, unless --sync-every is given
LATENCY_US = 50.0  # unless --latency is given
BUCKET, WINDOW = 1 << 21, 1 << 23
FEW_SUMS, LEAST_SUM = 4, 1 << 16  # of a small model (csrc/api/reduce.c)
NUMBER_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 4 / 256}
"""Bytes of a number on the wire."""
LOSS, NEWS = 2, 1  # latencies of a step; ZeRO-1 has another one, for the norm
MOST_RANKS = 1024
TIED = "wte.weight"  # which may also be the head
EMBEDDINGS = (TIED, "wpe.weight")


@dataclass(frozen=True)
class Method:
    """A way to train on several ranks."""

    name: str
    step_s: float
    efficiency: float  # the speed of N processes alone / that of N ranks, inverted
    best_ranks: int  # beyond which no step is shorter


@dataclass(frozen=True)
class Cluster:
    """The memory of each rank, and its steps."""

    ranks: int
    engine_bytes: int  # of the rank that needs most
    optimizer_bytes: int
    sharded_engine_bytes: int  # with --zero 1; the same on GPUs, which have no parts
    sharded_optimizer_bytes: int
    outer_bytes: int  # more of each rank, outside the engine, with --sync-every
    methods: list[Method]


def predict(
    setup: Setup, costs: Costs, n_ranks: int, link: str | None, latency_us: float
) -> Cluster:
    """The plan of the same run on `n_ranks`; without a `link`, of its memory alone."""
    options, model = setup.options, setup.model
    each = replace(model.options, wire=options.wire)  # which one process has no use for
    whole = plan_for(model.config, each)
    sharded = _largest_part(model.config, each, n_ranks) if each.device == "cpu" else whole
    methods = [] if link is None else list(_methods(setup, costs, n_ranks, link, latency_us / 1e6))
    return Cluster(
        n_ranks,
        whole.total_bytes,
        whole.optimizer_bytes,
        sharded.total_bytes,
        sharded.optimizer_bytes,
        outer_bytes(sum(math.prod(shape) for _, shape, _ in model.trained)),
        methods,
    )


def _largest_part(config: GPTConfig, options: Options, n_ranks: int) -> Plan:
    """The plan of the rank that needs most; whole matrices of Muon are not of one size."""
    parts = range(n_ranks) if options.optimizer == "muon" else [n_ranks - 1]
    plans = [plan_for(config, replace(options, n_shards=n_ranks, shard=r)) for r in parts]
    return max(plans, key=lambda plan: plan.total_bytes)


def exchange_s(
    n_numbers: int,
    n_ranks: int,
    bytes_per_s: float,
    latency_s: float,
    number_bytes: float = 4,
    n_calls: int = 1,
) -> float:
    """Seconds of a sum on all ranks: its parts, then their copies, in one call or several."""
    if n_ranks == 1:
        return 0.0
    moved = 2 * (n_ranks - 1) / n_ranks * number_bytes * n_numbers
    if latency_s:
        bytes_per_s = min(bytes_per_s, WINDOW / latency_s)
    return moved / bytes_per_s + 2 * n_calls * latency_s


def least_sum(n_numbers: int) -> int:
    """Numbers of a sum, or more. Without a sharded state, small models have several sums too."""
    return min(BUCKET, max(LEAST_SUM, n_numbers // FEW_SUMS))


class Gradients(NamedTuple):
    """Numbers of gradients, by when backward completes them."""

    layers: int  # of products, the last layer's first
    tied: int  # of an embedding that is also the head: begun first, and complete when backward ends
    others: int  # of other embeddings, norms and biases: when it ends

    @property
    def total(self) -> int:
        return sum(self)


def exposed_s(
    gradients: Gradients, least: int, backward_s: float, sum_s: Callable[[int], float]
) -> float:
    """Seconds of sums that a rank waits for after its last backward pass.

    Each sum has `least` numbers or more, and takes `sum_s` of them.
    """
    if gradients.total <= least:
        return sum_s(gradients.total)
    n_sums = max(1, gradients.layers // least)
    ended_s, step = 0.0, gradients.layers / n_sums
    for i in range(1, n_sums + 1):
        computed = gradients.tied + i * step
        ready_s = backward_s * computed / (gradients.tied + gradients.layers or 1)
        ended_s = max(ended_s, ready_s) + sum_s(round(step))
    last_s = sum(sum_s(n) for n in gradients[1:] if n)
    return max(ended_s - backward_s, 0.0) + last_s


def _gradients(setup: Setup) -> Gradients:
    sizes = {name: math.prod(shape) for name, shape, _ in setup.model.trained}
    embeddings = {name: n for name, n in sizes.items() if name in EMBEDDINGS}
    tied = embeddings.get(TIED, 0) if setup.model.config.tied else 0
    layers = sum(
        math.prod(shape)
        for name, shape, _ in setup.model.trained
        if len(shape) > 1 and name not in embeddings
    )
    return Gradients(layers, tied, sum(sizes.values()) - layers - tied)


def _methods(
    setup: Setup, costs: Costs, n_ranks: int, link: str, latency_s: float
) -> Iterator[Method]:
    options, speed = setup.options, LINKS[link]
    passes_s, update_s = options.grad_accum * costs.pass_s, costs.update_s
    gradients = _gradients(setup)
    n_numbers = gradients.total
    every, number_bytes = options.sync_every or SYNC_EVERY, NUMBER_BYTES[options.wire]

    def step_s(name: str, n: int) -> float:
        link_s = speed, latency_s
        wait_s = latency_s if n > 1 else 0.0
        if name == "DiLoCo":  # in groups of parameters
            n_calls = math.ceil(n_numbers / MOST_NUMBERS)
            whole_s = exchange_s(n_numbers, n, *link_s, n_calls=n_calls)
            return passes_s / n + update_s + (whole_s + NEWS * wait_s) / every
        said_s = (LOSS + NEWS) * wait_s
        backward_s = 2 / 3 * min(costs.pass_s, passes_s / n)

        def sum_s(numbers: int) -> float:
            return exchange_s(numbers, n, *link_s, number_bytes)

        if name == "ZeRO-1":  # parameters come back as fp32, in the ranges of the sums
            if options.optimizer == "adamw":
                waits_s = exposed_s(gradients, BUCKET, backward_s, lambda some: sum_s(some) / 2)
                n_calls = max(1, n_numbers // BUCKET)
            else:  # one range of whole matrices
                waits_s, n_calls = sum_s(n_numbers) / 2, 1
            back_s = exchange_s(n_numbers, n, *link_s, n_calls=n_calls) / 2
            return passes_s / n + update_s / n + waits_s + back_s + wait_s + said_s
        waits_s = exposed_s(gradients, least_sum(n_numbers), backward_s, sum_s)
        return passes_s / n + update_s + waits_s + said_s

    for name in ("data parallel", "ZeRO-1", "DiLoCo"):
        if name == "ZeRO-1" and setup.model.options.device != "cpu":
            continue
        found = step_s(name, n_ranks)
        most = min(MOST_RANKS, options.batch_size * options.grad_accum)
        best = min(range(1, most + 1), key=lambda n: step_s(name, n))
        yield Method(name, found, (passes_s + update_s) / (n_ranks * found), best)


def described(found: Cluster, link: str | None, every: int) -> Iterator[str]:
    """The lines of a plan about ranks."""
    line = (
        f"  ranks   {found.ranks}: {amount(found.engine_bytes)} for each engine, "
        f"{amount(found.optimizer_bytes)} of it for the optimizer"
    )
    if found.sharded_engine_bytes != found.engine_bytes:
        line += (
            f"; with --zero 1 {amount(found.sharded_engine_bytes)}, "
            f"{amount(found.sharded_optimizer_bytes)} of it"
        )
    yield f"{line}; with --sync-every {amount(found.outer_bytes)} more"
    for method in found.methods:
        how = f" with --sync-every {every or SYNC_EVERY}" if method.name == "DiLoCo" else ""
        yield (
            f"  {link:<7} {method.name}{how}: {span(method.step_s)} a step, "
            f"{method.efficiency:.0%} of the speed without messages; "
            f"at most {plural(method.best_ranks, 'rank pays', 'ranks pay')}"
        )


def check_link(link: str | None, latency_us: float | None, n_ranks: int | None) -> None:
    """UsageError for a link without ranks, and a latency without a link or out of range."""
    if link is not None and n_ranks is None:
        raise UsageError(f"--link {link} is of several ranks: add --ranks 4")
    if latency_us is None:
        return
    if not 0 <= latency_us < math.inf:
        raise UsageError(f"--latency is {latency_us:g}; it must be 0 or more, and finite")
    if link is None:
        raise UsageError(f"--latency {latency_us:g} is of a network: add --link 10G")
