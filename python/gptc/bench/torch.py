"""The gpt2 and llama families in PyTorch, for comparison: fused attention, fused AdamW.

Imported only by `gptc bench --against torch`. Shapes as in csrc/ops.h.
"""

# PyTorch is not installed where mypy runs.
# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from gptc.engine.config import GPTConfig
from gptc.errors import UsageError


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised input, added to the stream."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.c = c
        q, kv = c.n_head * c.head_size, c.n_kv_head * c.head_size
        fc = 2 * c.n_ff if c.activation == "swiglu" else c.n_ff
        self.norm_1, self.norm_2 = make_norm(c), make_norm(c)
        self.qkv = nn.Linear(c.n_embd, q + 2 * kv, bias=c.bias)
        self.att_proj = nn.Linear(q, c.n_embd, bias=c.bias)
        self.fc = nn.Linear(c.n_embd, fc, bias=c.bias)
        self.mlp_proj = nn.Linear(c.n_ff, c.n_embd, bias=c.bias)

    def forward(self, x: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)"""
        c = self.c
        B, T, _ = x.shape
        kv = c.n_kv_head * c.head_size
        q, k, v = self.qkv(self.norm_1(x)).split((c.n_head * c.head_size, kv, kv), dim=2)
        q, k, v = (z.view(B, T, -1, c.head_size).transpose(1, 2) for z in (q, k, v))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        grouped = {"enable_gqa": True} if c.n_kv_head < c.n_head else {}
        att = F.scaled_dot_product_attention(q, k, v, is_causal=True, **grouped)
        x = x + self.att_proj(att.transpose(1, 2).reshape(B, T, -1))
        h = self.fc(self.norm_2(x))
        if c.activation == "gelu":
            h = F.gelu(h, approximate="tanh")
        elif c.activation == "swish":
            h = F.silu(h)
        else:
            gate, up = h.chunk(2, dim=2)
            h = F.silu(gate) * up
        return x + self.mlp_proj(h)


class GPT(nn.Module):
    """Token ids to the mean loss."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.block_size, c.n_embd) if c.pos == "learned" else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm_f = make_norm(c)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.wte.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        if c.pos == "rope":
            frequency = c.rope_theta ** -(torch.arange(c.head_size // 2) * 2 / c.head_size)
            angles = torch.outer(torch.arange(c.block_size), frequency)
            self.register_buffer("rope", torch.polar(torch.ones_like(angles), angles))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(B, T), (B, T) -> ()"""
        x = self.wte(tokens)
        rope = None
        if self.wpe is not None:
            x = x + self.wpe.weight[: tokens.shape[1]]
        else:
            rope = torch.view_as_real(self.rope[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x, rope)
        return F.cross_entropy(self.head(self.norm_f(x)).flatten(0, 1), targets.flatten())


def make_norm(c: GPTConfig) -> nn.Module:
    """The norm of this configuration."""
    if c.norm == "layernorm":
        return nn.LayerNorm(c.n_embd, c.norm_eps, elementwise_affine=c.norm_weight, bias=c.bias)
    return nn.RMSNorm(c.n_embd, c.norm_eps, elementwise_affine=c.norm_weight)


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotary positions of (B, NH, T, HS) by (T, HS/2, 2)."""
    a, b = x.chunk(2, dim=3)
    cos, sin = rope[..., 0].to(x.dtype), rope[..., 1].to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=3)


def make_product(name: str, rows: int, device: str, *, bf16: bool):
    """The products of an op such as "linear_forward 768 x 3072": forward, or both of backward."""
    op, n_in, n_out = name.split()[0], int(name.split()[1]), int(name.split()[3])
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, dy, w = (
        torch.randn(shape, dtype=dtype, device=device)
        for shape in ((rows, n_in), (rows, n_out), (n_out, n_in))
    )

    def product() -> None:
        if op == "linear_forward":
            torch.nn.functional.linear(x, w)
        else:
            dy @ w, dy.T @ x
        if device == "cuda":
            torch.cuda.synchronize()

    return product


def make_step(config: GPTConfig, inputs, targets, device: str, *, bf16: bool, compiled: bool):
    """A training step on this batch: forward, backward, clipping at 1, AdamW."""
    if config.pos == "rope_wide":
        raise UsageError("the comparison with PyTorch covers the gpt2 and llama families")
    model = GPT(config).to(device)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    x, y = (torch.from_numpy(batch).long().to(device) for batch in (inputs, targets))

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = run(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step
