#!/usr/bin/env python3
"""What a step costs on a GPU: launches, FLOPs and bytes of each kernel, and the time they need.

    tools/gpu/model.py                                      GPT-2 124M, 64 x 1024 tokens, H200
    tools/gpu/model.py --preset byte --card h100            another preset, another card
    tools/gpu/model.py --context 576 --batch 1              a decoding step after so many tokens
    tools/gpu/model.py --measured ncu.csv                   with the output of `ncu --metrics
                                                            gpu__time_duration.sum --csv`
    tools/gpu/model.py --check build/gpu/tests/cuda/emulated_launches

The floor of a kernel is the larger of two times: its bytes at the card's bandwidth, and its FLOPs
at the card's dense bf16 rate. What is read twice from the cache counts once. The expectation
divides both by an efficiency, takes as long as the shortest kernel at least, and adds the gap to
the next one.

--check compares the list of launches with the one that the emulation records, in order: it fails
after a change of csrc/ that is not made here too. The list is that of bf16 without dropout.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

ACT, FLOAT = 2, 4  # bytes of an activation, and of a float32
PACK = 8  # activations that a thread reads at once
WARP = 32
FEW_ROWS, MOST_ROWS = 8, 64  # of our own products: product_few.cu, product_rows_bf16.cu
FEW_EXPERT_ROWS = 16  # experts.cu
SPLIT_ROWS = 32  # the most rows of a decoding step that are cut into pieces of keys


@dataclass(frozen=True)
class Card:
    """Published figures, and the shares of them that kernels reach."""

    name: str
    bandwidth: float  # bytes a second
    flops: float  # dense bf16 products with float32 sums, a second
    # Shares of that: measured on an H200 (docs/log/2026-11-26-cuda-h200.md), assumed elsewhere.
    products: float = 0.63  # what the others leave of a step of GPT-2; the head's dw reaches 0.79
    attention: float = 0.36  # 0.33 forward, 0.41 queries, 0.35 keys
    memory: float = 0.80  # 0.81 classifier, 0.82 norm backward
    gap_us: float = 1.0  # between two nodes of a graph
    least_us: float = 2.0  # of a kernel that waits for memory; with the gap, decoding's 0.31 ms


CARDS = {
    "h100": Card("H100 SXM", 3.35e12, 989.4e12),
    "h200": Card("H200", 4.8e12, 989.4e12),
    "a100": Card("A100 SXM 80 GB", 2.039e12, 312e12, products=0.8, attention=0.5),
    "4090": Card("RTX 4090", 1.008e12, 165.2e12, products=0.85, attention=0.55, memory=0.9),
}


@dataclass(frozen=True)
class Limits:
    """Sizes at which kernels choose another way; the emulation has smaller ones."""

    chunk_bytes: int = 544 << 20  # of logits: classifier.cu
    multiprocessors: int = 132  # norm.cu
    few_norm_rows: int = 512  # norm.cu
    max_segments: int = 512  # update.h


@dataclass(frozen=True)
class Config:
    """A model's shape. Names as in ops.h."""

    V: int
    block: int
    L: int
    NH: int
    NKV: int
    C: int
    F: int
    family: str  # gpt2, llama or byte
    qk_norm: bool = False
    E: int = 0  # experts, and those of a token
    K: int = 0

    @property
    def HS(self) -> int:
        return self.C // self.NH

    @property
    def Vp(self) -> int:
        return (self.V + 63) // 64 * 64

    @property
    def QKV(self) -> int:
        return (self.NH + 2 * self.NKV) * self.HS

    @property
    def bias(self) -> bool:
        return self.family == "gpt2"

    @property
    def rope(self) -> bool:
        return self.family != "gpt2"

    @property
    def norm_weight(self) -> bool:
        return self.family != "byte"

    @property
    def FC(self) -> int:
        """Outputs of the first feed-forward layer."""
        return 2 * self.F if self.family == "llama" else self.F

    def flops_per_token(self, T: int) -> float:
        """Of a forward pass, by which MFU is reckoned: forward_flops_per_token of config.c."""
        layer = self.C * self.QKV + self.C * self.C + self.C * self.E
        layer += max(self.K, 1) * self.C * (self.FC + self.F)
        return 2.0 * (self.L * layer + self.C * self.V) + 2.0 * self.L * T * self.C


PRESETS = {
    "byte": Config(256, 1024, 16, 8, 8, 512, 1024, "byte"),
    "gpt2": Config(50257, 1024, 12, 12, 12, 768, 3072, "gpt2"),
    "gpt2-medium": Config(50257, 1024, 24, 16, 16, 1024, 4096, "gpt2"),
    "gpt2-large": Config(50257, 1024, 36, 20, 20, 1280, 5120, "gpt2"),
    "gpt2-xl": Config(50257, 1024, 48, 25, 25, 1600, 6400, "gpt2"),
    "llama-110m": Config(32000, 1024, 12, 12, 12, 768, 2048, "llama"),
}


@dataclass(frozen=True)
class Launch:
    """A node of a graph, and what it costs."""

    name: str  # of the kernel, or product or memset
    part: str  # what it does
    kind: str  # products, attention or memory
    flops: float = 0.0
    read: float = 0.0
    written: float = 0.0
    shape: tuple[str, int, int, int] | None = None  # of a product: its kind, rows, columns, terms

    @property
    def key(self) -> str:
        return " ".join(map(str, ("product", *self.shape))) if self.shape else self.name

    def floor_s(self, card: Card) -> float:
        return max((self.read + self.written) / card.bandwidth, self.flops / card.flops)

    def expected_s(self, card: Card) -> float:
        rate = card.attention if self.kind == "attention" else card.products
        transfer = (self.read + self.written) / (card.bandwidth * card.memory)
        compute = self.flops / (card.flops * rate)
        return max(transfer, compute, 1e-6 * card.least_us) + 1e-6 * card.gap_us


def div_up(a: int, b: int) -> int:
    return -(-a // b)


def memory(name: str, part: str, read: float, written: float) -> Launch:
    return Launch(name, part, "memory", 0.0, read, written)


def product(
    part: str,
    kind: str,
    M: int,
    N: int,
    K: int,
    *,
    floats: bool = False,
    add: bool = False,
    extra_read: float = 0,
    extra_written: float = 0,
) -> Launch:
    """A product of the library: out (M, N), sums of K terms."""
    out = M * N * (FLOAT if floats else ACT)
    read = ACT * (M * K + K * N) + (out if add else 0) + extra_read
    shape = (kind, M, N, K)
    return Launch("product", part, "products", 2.0 * M * N * K, read, out + extra_written, shape)


def weight_product(
    part: str, M: int, N: int, K: int, *, floats: bool = False, extra_written: float = 0
) -> Launch:
    """A product with a weight (N, K): of a few rows by a kernel of ours, else the library's."""
    x = product(part, "NT", M, N, K, floats=floats, extra_written=extra_written)
    if (FEW_ROWS if floats else MOST_ROWS) < M:
        return x
    name = "few_product_kernel" if M <= FEW_ROWS else "rows_product_kernel"
    return replace(x, name=name, kind="memory", shape=None)


@dataclass(frozen=True)
class Step:
    """The launches of a step of N rows: of B sequences of T tokens, or one token of each."""

    c: Config
    B: int
    T: int  # 1 where it decodes
    context: int = 0  # keys of each row, where it decodes
    limits: Limits = field(default_factory=Limits)

    @property
    def N(self) -> int:
        return self.B * self.T

    def check(self) -> None:
        """The list is written for sizes that all kernels read in whole vectors."""
        c = self.c
        if any(n % PACK for n in (c.C, c.F, c.HS, c.QKV)) or c.HS > 128:
            raise SystemExit("widths must be multiples of 8, and heads at most 128 wide")

    # ---- forward ----

    def norm(self, part: str, branch: bool) -> Launch:
        c, size = self.c, self.N * self.c.C * ACT
        warps = div_up(c.C, WARP * PACK)
        name = "residual_norm_forward_kernel"
        few = self.limits.few_norm_rows >= self.N
        if warps <= 16 and few:
            name = "few_norm_forward_kernel"
        elif c.C > 32 * WARP:
            name = "long_norm_forward_kernel"
        passes = 2 if branch else 1
        return memory(name, part, passes * size, passes * size + 8 * self.N)

    def linear(self, part: str, IC: int, OC: int, *, kept: bool = False) -> Iterator[Launch]:
        """With the family's bias, and for `fc` its activation. kept: fc_pre is written too."""
        c, N, fc = self.c, self.N, part == "fc"
        width = c.FC if fc else OC
        gelu = fc and c.family == "gpt2"
        extra = ACT * N * width if gelu and kept else 0
        yield weight_product(part, N, width, IC, extra_written=extra)
        if fc and not gelu:
            name = "activation_forward_kernel"
            yield memory(name, "activation", ACT * N * width, ACT * N * c.F)

    def qk_norm(self) -> Iterator[Launch]:
        c = self.c
        if c.qk_norm:
            size = ACT * self.N * (c.NH + c.NKV) * c.HS
            kept = 0 if self.context else size + FLOAT * self.N * (c.NH + c.NKV)
            yield memory("qk_norm_forward_kernel", "norm of heads", size, size + kept)

    def rope_kernel(self) -> Iterator[Launch]:
        c = self.c
        if c.rope:
            size = ACT * self.N * (c.NH + c.NKV) * c.HS
            yield memory("rope_forward_kernel", "rope", size, size)

    def pairs(self, products: int) -> float:
        """FLOPs of so many products of queries with the keys that they see."""
        return float(products) * self.B * self.c.C * self.T * (self.T + 1)

    def attention(self) -> Iterator[Launch]:
        c, N = self.c, self.N
        if self.context:
            yield from self.attention_decode()
            return
        out = ACT * N * c.C + FLOAT * N * c.NH
        yield Launch(
            "attention_forward_kernel",
            "attention",
            "attention",
            self.pairs(2),
            ACT * N * c.QKV,
            out,
        )

    def attention_decode(self) -> Iterator[Launch]:
        """A few rows' keys in pieces, a block each, which are joined where a row has several."""
        c, N = self.c, self.N
        piece = div_up(c.block, 32 * 64) * 64
        pieces = div_up(c.block, piece)
        if N > 64:
            size = ACT * N * 2 * c.NKV * c.HS
            yield memory("store_cache_kernel", "attention", size, size)
            yield memory("attention_prefill_kernel", "attention", 0, 0)
        read = ACT * N * (c.QKV + 2.0 * self.context * c.NKV * c.HS)
        flops = 4.0 * N * self.context * c.C
        used = div_up(self.context, piece)
        split = N <= SPLIT_ROWS and pieces > 1
        out = FLOAT * N * (c.C + 2 * c.NH) * used if split and used > 1 else ACT * N * c.C
        yield Launch("attention_decode_kernel", "attention", "memory", flops, read, out)
        if split:
            joined = used > 1
            yield memory(
                "attention_decode_join_kernel",
                "attention",
                out if joined else 0,
                ACT * N * c.C if joined else 0,
            )

    def expert_product(
        self, part: str, IC: int, OC: int, *, read: float, written: float, back: bool = False
    ) -> Launch:
        """Of the rows of all choices, each with its expert's weight. read: next to weights."""
        c, R = self.c, self.N * self.c.K
        few = R <= FEW_EXPERT_ROWS and not back
        name = "few_expert_kernel" if few else "expert_product_kernel"
        weights = ACT * min(c.E, R) * IC * OC
        kind = "memory" if few else "products"
        return Launch(name, part, kind, 2.0 * R * IC * OC, weights + read, written)

    def experts(self) -> Iterator[Launch]:
        """The feed-forward layer of a model with experts."""
        c, N, R = self.c, self.N, self.N * self.c.K
        x, rows, fc = ACT * N * c.C, ACT * R * c.C, ACT * R * c.FC
        logits, choices = FLOAT * N * c.E, 4 * R
        yield memory("route_logits_kernel", "route", x + FLOAT * c.E * c.C, logits)
        yield memory("route_choose_kernel", "route", logits, logits + 2 * choices)
        yield memory("route_places_kernel", "route", choices, choices)
        yield memory("expert_spread_kernel", "experts", x, rows)
        hidden = ACT * R * c.F
        kept = 0 if self.context else fc
        yield self.expert_product("experts, fc", c.C, c.FC, read=rows, written=hidden + kept)
        yield self.expert_product("experts, proj", c.F, c.C, read=hidden, written=rows)
        yield memory("expert_combine_kernel", "experts", rows, x)

    def experts_backward(self) -> Iterator[Launch]:
        c, N, R = self.c, self.N, self.N * self.c.K
        x, rows, fc, hidden = ACT * N * c.C, ACT * R * c.C, ACT * R * c.FC, ACT * R * c.F
        name, flops = "expert_product_kernel", 2.0 * R * c.C
        yield memory("expert_spread_kernel", "experts", x + rows, rows + FLOAT * R)
        part = "experts, proj, dx"
        yield self.expert_product(part, c.F, c.C, read=rows + fc, written=fc, back=True)
        dw = FLOAT * c.E * c.C
        yield Launch(name, "experts, proj, dw", "products", flops * c.F, rows + hidden, dw * c.F)
        yield memory("expert_spread_kernel", "experts", x, rows)
        yield self.expert_product("experts, fc, dx", c.C, c.FC, read=fc, written=rows, back=True)
        yield Launch(name, "experts, fc, dw", "products", flops * c.FC, rows + fc, dw * c.FC)
        yield memory("expert_combine_kernel", "experts", rows, x)
        logits, router = FLOAT * N * c.E, FLOAT * c.E * c.C
        partial = router * min(div_up(N, 64), 16)
        yield memory("route_logits_backward_kernel", "route", logits + 12 * R, logits)
        yield memory("route_inputs_backward_kernel", "route", logits + router + x, x)
        yield memory("route_weights_backward_kernel", "route", logits + x, partial)
        yield memory("route_weights_add_kernel", "route", partial + router, router)

    def embedding(self) -> Launch:
        c, size = self.c, self.N * self.c.C
        rows = FLOAT * min(size, self.c.V * self.c.C)
        positions = 0 if c.rope else FLOAT * self.T * c.C
        return memory("embedding_forward_kernel", "embedding", rows + positions, ACT * size)

    def forward(self) -> Iterator[Launch]:
        c = self.c
        yield self.embedding()
        for layer in range(c.L):
            yield self.norm("norm 1", layer > 0)
            yield from self.linear("qkv", c.C, c.QKV)
            yield from self.qk_norm()
            yield from self.rope_kernel()
            yield from self.attention()
            yield from self.linear("att_proj", c.C, c.C)
            yield self.norm("norm 2", True)
            if c.E:
                yield from self.experts()
                continue
            yield from self.linear("fc", c.C, c.F, kept=not self.context)
            yield from self.linear("mlp_proj", c.F, c.C)
        yield self.norm("norm f", True)

    # ---- backward ----

    def classifier(self) -> Iterator[Launch]:
        c, N = self.c, self.N
        rows = max(self.limits.chunk_bytes // (ACT * c.Vp) // 128, 1) * 128
        chunks = div_up(N, min(N, rows))
        rows = min(N, div_up(div_up(N, chunks), 128) * 128)
        for first in range(0, N, rows):
            n = min(rows, N - first)
            logits = ACT * n * c.Vp
            yield weight_product("head", n, c.Vp, c.C)
            yield memory("classifier_kernel", "loss", logits, logits)
            yield product("head, dx", "NN", n, c.C, c.Vp)
            yield product("head, dw", "TN", c.Vp, c.C, n, floats=True, add=first > 0)
        yield memory("total_kernel", "loss", FLOAT * N, FLOAT)

    def sums(self, part: str, n: int, columns: int, chunks: int) -> Launch:
        size = FLOAT * n * columns
        return memory("add_chunks_kernel", part, chunks * size + size, size)

    def norm_backward(self, part: str, *, bias: bool) -> Iterator[Launch]:
        """Adds to the residual stream's gradient. bias: sums the branch's last layer's too."""
        c, N, size = self.c, self.N, self.N * self.c.C * ACT
        warps, sums = div_up(c.C, WARP * PACK), 3 if bias else 2
        if warps > 16:
            yield memory("long_norm_backward_kernel", part, 3 * size, size)
            if c.norm_weight or bias:
                read = (3 if bias else 2) * size
                chunks = min(div_up(N, 32), 128)
                yield memory("norm_weights_backward_kernel", part, read, FLOAT * 3 * c.C * chunks)
                yield self.sums(part, 3, c.C, chunks)
            return
        blocks = (6 - warps if warps < 4 else 2) if warps <= 4 else 6
        chunks = min(div_up(N, 8), blocks * self.limits.multiprocessors)
        name = "residual" if warps <= 4 else "wide"
        written = size + FLOAT * sums * c.C * chunks
        yield memory(f"{name}_norm_backward_kernel", part, 3 * size + 8 * N, written)
        if c.norm_weight or bias:
            yield self.sums(part, sums, c.C, chunks)

    def linear_backward(
        self, part: str, IC: int, OC: int, *, activation: bool = False, bias: bool = False
    ) -> Iterator[Launch]:
        """activation: the layer's input was made by one."""
        c, N = self.c, self.N
        pre = ACT * N * c.FC if activation else 0
        fused = activation and c.family == "gpt2"
        yield product(f"{part}, dx", "NN", N, IC, OC, extra_read=pre if fused else 0)
        if activation and not fused:
            name = "activation_backward_kernel"
            yield memory(name, "activation", ACT * N * IC + pre, pre)
        yield product(f"{part}, dw", "TN", OC, IC, N, floats=True)
        if bias:
            yield from self.sum_columns(f"{part}, db", OC)

    def sum_columns(self, part: str, columns: int) -> Iterator[Launch]:
        chunks = min(div_up(self.N, 32), 128)
        size = FLOAT * columns * chunks
        yield memory("sum_columns_kernel", part, ACT * self.N * columns, size)
        yield self.sums(part, 1, columns, chunks)

    def attention_backward(self) -> Iterator[Launch]:
        c, N = self.c, self.N
        stats = FLOAT * N * c.NH
        q, kv = ACT * N * c.C, ACT * N * 2 * c.NKV * c.HS
        yield Launch(
            "attention_backward_queries_kernel",
            "attention",
            "attention",
            self.pairs(3),
            3 * q + kv + stats,
            q + 2 * stats,
        )
        yield Launch(
            "attention_backward_keys_kernel",
            "attention",
            "attention",
            self.pairs(4),
            2 * q + kv + 2 * stats,
            kv,
        )
        tiles = self.B * div_up(self.T, 64)
        if not c.bias or c.rope:
            return
        if tiles <= div_up(N, 16):  # their kernels have summed each
            yield self.sums("qkv, db", 1, c.QKV, tiles)
        else:
            yield from self.sum_columns("qkv, db", c.QKV)

    def qk_norm_backward(self) -> Iterator[Launch]:
        c, part = self.c, "norm of heads"
        if not c.qk_norm:
            return
        size, chunks = ACT * self.N * (c.NH + c.NKV) * c.HS, min(div_up(self.N, 32), 128)
        sums = FLOAT * 2 * c.HS * chunks
        yield memory("qk_norm_weights_backward_kernel", part, 2 * size, sums)
        yield self.sums(part, 2, c.HS, chunks)
        yield memory("qk_norm_backward_kernel", part, 2 * size, size)

    def embedding_backward(self) -> Iterator[Launch]:
        c, N, size = self.c, self.N, self.N * self.c.C
        counts = 4 * div_up(N, 1024) * c.V
        part = "embedding"
        yield memory("memset", part, 0, counts)
        yield memory("count_tokens_kernel", part, 4 * N, 8 * N)
        yield memory("sum_chunks_kernel", part, counts, counts + 4 * c.V)
        yield memory("scan_tokens_kernel", part, 4 * c.V, 4 * c.V)
        yield memory("order_rows_kernel", part, 16 * N, 4 * N)
        rows = FLOAT * min(size, c.V * c.C)
        yield memory("embedding_backward_kernel", part, ACT * size + rows, rows)
        yield memory("add_pieces_kernel", part, 4 * N, 0)
        if not c.rope:
            table = FLOAT * self.T * c.C
            yield memory("position_backward_kernel", part, ACT * size + table, table)

    def small_gradients(self) -> int:
        """Numbers of gradients that no product writes."""
        c = self.c
        n = (2 * c.L + 1) * c.C * (2 if c.bias else 1) if c.norm_weight else 0
        n += 2 * c.L * c.HS if c.qk_norm else 0
        n += c.L * c.E * c.C  # routers
        return n + (c.L * (c.QKV + 2 * c.C + c.F) + c.block * c.C if c.bias else 0)

    def backward(self) -> Iterator[Launch]:
        c = self.c
        if self.small_gradients():
            yield memory("memset", "gradients", 0, FLOAT * self.small_gradients())
        yield from self.classifier()
        yield memory("memset", "gradients", 0, ACT * self.N * c.C)
        yield from self.norm_backward("norm f", bias=c.bias)
        for layer in reversed(range(c.L)):
            if c.E:
                yield from self.experts_backward()
            else:
                yield from self.linear_backward("mlp_proj", c.F, c.C, activation=True)
                yield from self.linear_backward("fc", c.C, c.FC, bias=c.bias)
            yield from self.norm_backward("norm 2", bias=c.bias)
            yield from self.linear_backward("att_proj", c.C, c.C)
            yield from self.attention_backward()
            yield from self.rope_kernel()
            yield from self.qk_norm_backward()
            yield from self.linear_backward("qkv", c.C, c.QKV, bias=c.bias and c.rope)
            yield from self.norm_backward("norm 1", bias=c.bias and layer > 0)
        yield from self.embedding_backward()

    # ---- update, and a step ----

    def tensors(self) -> tuple[int, int, int]:
        """Tensors, numbers in them, and those of them that products read."""
        c = self.c
        matrices = c.C * (c.QKV + c.C + max(c.E, 1) * (c.FC + c.F))
        n_norms = (2 if c.bias else 1) if c.norm_weight else 0
        norms = n_norms * (2 * c.L + 1)
        count = 1 + norms + 4 * c.L + (4 * c.L + 1 if c.bias else 0) + 2 * c.L * c.qk_norm
        count += c.L * (2 * c.E - 1) if c.E else 0
        numbers = c.Vp * c.C + c.L * matrices + self.small_gradients()
        return count, numbers, c.Vp * c.C + c.L * matrices

    def update(self) -> Iterator[Launch]:
        count, numbers, packed = self.tensors()
        yield memory("grad_norm_kernel", "update", FLOAT * numbers, 0)
        yield memory("grad_norm_end_kernel", "update", 8 * 1024, FLOAT)
        launches = div_up(count, self.limits.max_segments)
        for _ in range(launches):
            read, written = 4 * FLOAT * numbers, 3 * FLOAT * numbers + ACT * packed
            yield memory("adamw_update_kernel", "update", read / launches, written / launches)

    def head(self) -> Launch:
        """Of a step of decoding: float32 logits."""
        c, N = self.c, self.N
        return weight_product("head", N, c.Vp, c.C, floats=True)

    def launches(self) -> list[Launch]:
        self.check()
        if self.context:
            return [*self.forward(), self.head()]
        return [*self.forward(), *self.backward(), *self.update()]


# ---- measurements ----


def base_name(kernel: str) -> str:
    """As the launches have it: without what a template and a function are given."""
    return kernel.split("<")[0].split("(")[0].split()[-1]


_MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


def read_ncu(path: Path) -> list[tuple[str, float]]:
    """Kernels with their microseconds, in order, of ncu's CSV."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("==")]
    rows = []
    for row in csv.DictReader(lines):
        if row.get("Metric Name") == "gpu__time_duration.sum":
            value = float(row["Metric Value"].replace(",", ""))
            rows.append((row["Kernel Name"], value * _MICROSECONDS[row["Metric Unit"]]))
    return rows


def align(launches: list[Launch], rows: list[tuple[str, float]]) -> list[float]:
    """Microseconds of each launch; of several steps, the mean. A memset has none (ncu shows none).

    The library's kernels have names that change from version to version: one that is not ours takes
    the place of a product, and a second one in a row, which adds up parts of a sum, belongs to it.
    """
    kernels = [i for i, launch in enumerate(launches) if launch.name != "memset"]
    ours = {launch.name for launch in launches}
    first = launches[kernels[0]].name
    names = [base_name(name) for name, _ in rows]
    if first not in names:
        raise SystemExit(f"the measurement has no {first}, with which a step begins")
    times: list[list[float]] = [[] for _ in launches]
    at = 0
    for name, us in rows[names.index(first) :]:
        launch = launches[kernels[at % len(kernels)]]
        if base_name(name) not in ours and not launch.shape:
            times[kernels[(at - 1) % len(kernels)]][-1] += us
            continue
        if base_name(name) != launch.name and (base_name(name) in ours or not launch.shape):
            raise SystemExit(f"launch {at} was {name}; the model has {launch.key}")
        times[kernels[at % len(kernels)]].append(us)
        at += 1
    if at < len(kernels):
        raise SystemExit(f"the measurement ends after {at} of {len(kernels)} kernels of a step")
    return [sum(all_of) / len(all_of) if all_of else 0.0 for all_of in times]


def measured(path: Path, launches: list[Launch]) -> list[float | None]:
    """Microseconds of each launch, by ncu's CSV, or by a JSON object: kernel, or product's part."""
    if path.suffix == ".json":
        by_name = json.loads(path.read_text())
        return [by_name.get(x.part if x.shape else x.name) for x in launches]
    return list(align(launches, read_ncu(path)))


# ---- the page ----


def page(step: Step, card: Card, times: list[float | None] | None = None) -> str:
    """A table with a line for each kind of launch, and its sums."""
    launches = step.launches()
    rows: dict[tuple[str, str, str], list[int]] = {}
    for i, launch in enumerate(launches):
        rows.setdefault((launch.name, launch.part, launch.key), []).append(i)
    titles = ["kernel", "part", "launches", "GFLOP", "MB read", "MB written", "floor", "expected"]
    titles += ["measured"] if times else []
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]

    def line(cells: list[str], which: list[int]) -> str:
        some = [launches[i] for i in which]
        cells += [
            f"{len(some)}",
            f"{sum(x.flops for x in some) / 1e9:,.1f}",
            f"{sum(x.read for x in some) / 1e6:,.1f}",
            f"{sum(x.written for x in some) / 1e6:,.1f}",
            f"{sum(x.floor_s(card) for x in some) * 1e3:.3f}",
            f"{sum(x.expected_s(card) for x in some) * 1e3:.3f}",
        ]
        if times:
            known = [t for i in which if (t := times[i]) is not None]
            cells.append(f"{sum(known) / 1e3:.3f}" if known else "")
        return "| " + " | ".join(cells) + " |"

    def cost(item: tuple[tuple[str, str, str], list[int]]) -> float:
        return -sum(launches[i].expected_s(card) for i in item[1])

    for (name, part, _), which in sorted(rows.items(), key=cost):
        x = launches[which[0]]
        shape = f" {x.shape[0]} {x.shape[1]} x {x.shape[2]} x {x.shape[3]}" if x.shape else ""
        lines.append(line([name + shape, part], which))
    lines.append(line(["**all**", ""], list(range(len(launches)))))
    return "\n".join([*lines, "", *summary(step, card, launches)])


def summary(step: Step, card: Card, launches: list[Launch]) -> list[str]:
    """The rates that follow."""
    lines = []
    for word, seconds in (
        ("floor", sum(x.floor_s(card) for x in launches)),
        ("expected", sum(x.expected_s(card) for x in launches)),
    ):
        text = f"{word}: {seconds * 1e3:.2f} ms, {step.N / seconds:,.0f} tokens/s"
        if not step.context:
            used = 3 * step.c.flops_per_token(step.T) * step.N / seconds
            text += f", MFU {used / card.flops:.0%}"
        lines.append(text)
    lines.append(f"nodes of graphs: {len(launches)}")
    return lines


# ---- the emulation's list ----

TRAIN = ("batch=2", "seq=72", "vocab_size=400")  # two chunks of logits
SMALL = ("n_embd=64", "n_head=4", "n_kv_head=4", "n_ff=96")
CHECKS = (
    ("gpt2", *SMALL, *TRAIN),
    ("gpt2", "n_layer=1", "n_embd=1088", "n_head=17", "n_kv_head=17", "n_ff=64", "batch=1", "seq=9",
     "vocab_size=64", "block_size=16"),
    ("byte", *SMALL, *TRAIN, "n_layer=2"),
    ("llama-110m", "n_embd=64", "n_head=4", "n_kv_head=2", "n_ff=96", *TRAIN, "n_layer=2"),
    ("llama-110m", *SMALL, *TRAIN, "n_layer=2", "qk_norm=1"),
    ("llama-110m", *SMALL, "vocab_size=400", "context=3", "batch=3", "n_layer=2", "qk_norm=1"),
    ("gpt2", *SMALL, "vocab_size=400", "context=70", "batch=1"),
    ("gpt2", *SMALL, "vocab_size=400", "context=5", "batch=12", "n_layer=2"),
    ("gpt2", *SMALL, "vocab_size=400", "context=66", "batch=33", "n_layer=1"),
    ("byte", *SMALL, "context=5", "batch=4", "block_size=64", "n_layer=2"),
    ("llama-110m", *SMALL, "vocab_size=400", "context=3", "batch=3", "n_layer=2"),
    ("llama-110m", *SMALL, *TRAIN, "n_layer=2", "n_expert=4", "n_expert_used=2"),
    ("llama-110m", *SMALL, "batch=1", "seq=9", "vocab_size=64", "n_layer=1", "n_expert=3",
     "n_expert_used=1"),
    ("llama-110m", *SMALL, "vocab_size=400", "context=3", "batch=3", "n_layer=2", "n_expert=4",
     "n_expert_used=2"),
    ("llama-110m", *SMALL, "vocab_size=400", "context=5", "batch=12", "n_layer=1", "n_expert=4",
     "n_expert_used=2"),
)  # fmt: skip
FIELDS = {
    "n_layer": "L",
    "n_embd": "C",
    "n_head": "NH",
    "n_kv_head": "NKV",
    "n_ff": "F",
    "vocab_size": "V",
    "block_size": "block",
    "qk_norm": "qk_norm",
    "n_expert": "E",
    "n_expert_used": "K",
}
MOST_NODES = 400  # of a training step of 12 layers


def step_of(check: tuple[str, ...], limits: Limits) -> Step:
    given = {name: int(value) for name, value in (word.split("=") for word in check[1:])}
    config = PRESETS[check[0]]
    for name in FIELDS.keys() & given.keys():
        config = replace(config, **{FIELDS[name]: given[name]})  # type: ignore[arg-type]
    context = given.get("context", 0)
    T = 1 if context else given.get("seq", 8)
    return Step(config, given.get("batch", 1), T, context, limits)


def recorded(text: str) -> tuple[list[str], Limits]:
    """The nodes of graphs in a trace, and the limits that it begins with."""
    nodes, limits, inside = [], Limits(), False
    for words in map(str.split, text.splitlines()):
        if words[0] == "limits":
            values = {k: int(v) for k, v in (word.split("=") for word in words[1:])}
            limits = Limits(**values)
        elif words[0] in ("graph", "end"):
            inside = words[0] == "graph"
        elif inside and words[0] == "product":
            nodes.append(" ".join(words[:5]))
        elif inside:
            nodes.append(words[1] if words[0] == "kernel" else words[0])
    return nodes, limits


def differences(wanted: list[str], found: list[str]) -> str | None:
    """The first difference of two lists of launches."""
    for i in range(max(len(wanted), len(found))):
        a = wanted[i] if i < len(wanted) else "nothing"
        b = found[i] if i < len(found) else "nothing"
        if a != b:
            return f"launch {i}: the model has {a}, the emulation {b}"
    return None


def check(program: Path) -> int:
    failed = 0
    for arguments in CHECKS:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{program} {' '.join(arguments)}: {done.stderr}")
        text = done.stdout
        found, limits = recorded(text)
        step = step_of(arguments, limits)
        wanted = [launch.key for launch in step.launches()]
        problem = differences(wanted, found)
        # On a card, one launch updates all tensors.
        updates = found.count("adamw_update_kernel")
        nodes = len(found) - max(0, updates - 1)
        if not problem and not step.context and nodes >= MOST_NODES and step.c.L == 12:
            problem = f"{MOST_NODES} nodes or more for 12 layers"
        failed += problem is not None
        print(f"{' '.join(arguments)}: {nodes} nodes, {problem or 'as the model has them'}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="gpt2")
    parser.add_argument("--card", choices=CARDS, default="h200")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--context", type=int, default=0, help="a decoding step with so many keys")
    parser.add_argument("--measured", type=Path, help="ncu's CSV, or JSON: microseconds a launch")
    parser.add_argument("--check", type=Path, help="the program emulated_launches")
    options = parser.parse_args()
    if options.check:
        return check(options.check)
    T = 1 if options.context else options.seq
    step = Step(PRESETS[options.preset], options.batch, T, options.context)
    times = measured(options.measured, step.launches()) if options.measured else None
    card = CARDS[options.card]
    what = f"after {options.context} tokens" if options.context else f"x {options.seq} tokens"
    print(f"{options.preset}, {options.batch} {what}, bf16, {card.name}; times in ms\n")
    print(page(step, card, times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
