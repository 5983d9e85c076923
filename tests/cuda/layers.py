"""Compares the errors of our bf16 layers with those of PyTorch's, both against float64.

GPTC_TEST_TABLES="cuda bf16" layers FILE; python3 tests/cuda/layers.py FILE

FILE holds what went into each layer and what came out (layers.c). Every array that came out may be
off by twice as much as PyTorch's in bf16, relative to its norm. One JSON object is printed.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

LIMIT = 2.0
ROUNDING = 1e-6  # of float32: what PyTorch happens to have exactly may be off by it

Tensors = dict[str, torch.Tensor]
Layer = Callable[[Tensors, dict[str, int]], Tensors]


def read(path: Path) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """The arrays of each case by their names."""
    data, at, cases = path.read_bytes(), 0, {}
    while at < len(data):
        name, n = struct.unpack_from("32sq", data, at)
        case, array = name.rstrip(b"\0").decode().split(".")
        cases.setdefault(case, {})[array] = np.frombuffer(data, np.float32, n, at + 40)
        at += 40 + 4 * n
    return cases


# ---- the layers: from what went in to what comes out; gradients by autograd ----


def embedding(x: Tensors, s: dict[str, int]) -> Tensors:
    wte, wpe = leaf(x["wte"].view(s["V"], s["C"])), leaf(x["wpe"].view(s["T"], s["C"]))
    out = F.embedding(x["tokens"].long().view(s["B"], s["T"]), wte) + wpe
    out.backward(x["dout"].view_as(out))
    return {"out": out, "dwte": wte.grad, "dwpe": wpe.grad}


def norm(kind: str) -> Layer:
    def run(x: Tensors, s: dict[str, int]) -> Tensors:
        def normed(of: torch.Tensor) -> torch.Tensor:
            if kind == "layernorm":
                return F.layer_norm(of, (s["C"],), w, eps=1e-5)
            return F.rms_norm(of, (s["C"],), w, eps=1e-5)

        resid, w, b = leaf(x["resid"].view(-1, s["C"])), leaf(x["w"]), leaf(x["b"])
        total = resid.detach() + x["branch"].view_as(resid)
        out = normed(total) + b
        resid.grad = x["dresid_before"].view_as(resid).clone()
        (normed(resid) + b).backward(x["dout"].view_as(resid))
        # The first norm was to be looked at only: it has no part in the gradients.
        return {"sum": total, "out": out, "dresid": resid.grad, "dw": w.grad, "db": b.grad}

    return run


def qk_norm(x: Tensors, s: dict[str, int]) -> Tensors:
    NH, NKV, HS = s["NH"], s["NKV"], s["HS"]
    qkv, q_w, k_w = leaf(x["qkv"].view(-1, NH + 2 * NKV, HS)), leaf(x["q_w"]), leaf(x["k_w"])
    q, k, v = qkv.split((NH, NKV, NKV), 1)
    out = torch.cat((F.rms_norm(q, (HS,), q_w, 1e-5), F.rms_norm(k, (HS,), k_w, 1e-5), v), 1)
    out.backward(x["dout"].view_as(out))
    return {"out": out, "dqkv": qkv.grad, "dq_w": q_w.grad, "dk_w": k_w.grad}


def rope(x: Tensors, s: dict[str, int]) -> Tensors:
    heads = s["NH"] + 2 * s["NKV"]
    qkv = x["qkv"].view(s["B"], s["T"], heads, s["HS"])
    turned, values = qkv[:, :, : heads - s["NKV"]], qkv[:, :, heads - s["NKV"] :]
    frequency = 10000 ** (-torch.arange(0, s["HS"], 2, dtype=torch.float64) / s["HS"])
    angles = torch.arange(s["T"], dtype=torch.float64)[:, None] * frequency
    cos, sin = (f(angles).to(qkv)[:, None] for f in (torch.cos, torch.sin))
    u, v = turned.chunk(2, -1)
    turned = torch.cat((u * cos - v * sin, v * cos + u * sin), -1)
    return {"out": torch.cat((turned, values), 2)}


def attention(x: Tensors, s: dict[str, int]) -> Tensors:
    B, T, NH, NKV, HS = (s[name] for name in ("B", "T", "NH", "NKV", "HS"))
    qkv = leaf(x["qkv"].view(B, T, NH + 2 * NKV, HS))
    q, k, v = qkv.transpose(1, 2).split((NH, NKV, NKV), 1)
    k, v = (y.repeat_interleave(NH // NKV, 1) for y in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    out.backward(x["dout"].view_as(out))
    return {"out": out, "dqkv": qkv.grad}


def mlp(activation: str) -> Layer:
    def run(x: Tensors, s: dict[str, int]) -> Tensors:
        w1, w2 = leaf(x["w1"].view(-1, s["C"])), leaf(x["w2"].view(s["C"], -1))
        b1, b2, inputs = leaf(x["b1"]), leaf(x["b2"]), leaf(x["in"].view(-1, s["C"]))
        pre = F.linear(inputs, w1, b1)
        pre.retain_grad()
        if activation == "gelu":
            fc = F.gelu(pre, approximate="tanh")
        elif activation == "swish":
            fc = F.silu(pre)
        else:
            gate, up = pre.chunk(2, -1)
            fc = F.silu(gate) * up
        out = F.linear(fc, w2, b2)
        out.backward(x["dout"].view_as(out))
        grads = {"dw1": w1, "db1": b1, "dw2": w2, "db2": b2, "dpre": pre, "din": inputs}
        return {"fc": fc, "out": out, **{name: y.grad for name, y in grads.items()}}

    return run


def classifier(x: Tensors, s: dict[str, int]) -> Tensors:
    inputs, wte = leaf(x["x"].view(-1, s["C"])), leaf(x["wte"].view(s["V"], s["C"]))
    logits = F.linear(inputs, wte)
    logits = logits.float() if logits.dtype is torch.bfloat16 else logits
    losses = F.cross_entropy(logits, x["targets"].long(), reduction="none")
    losses.mean().backward()
    return {"losses": losses, "dx": inputs.grad, "dwte": wte.grad}


LAYERS: dict[str, Layer] = {
    "embedding": embedding,
    "layernorm": norm("layernorm"),
    "rmsnorm": norm("rmsnorm"),
    "qk_norm": qk_norm,
    "rope": rope,
    "attention": attention,
    "gelu": mlp("gelu"),
    "swish": mlp("swish"),
    "swiglu": mlp("swiglu"),
    "classifier": classifier,
}


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


def parts(name: str, x: np.ndarray[Any, Any], s: dict[str, int]) -> dict[str, np.ndarray[Any, Any]]:
    """An array, or its three parts, which differ in size."""
    if name != "dqkv":
        return {name: x}
    heads = x.reshape(-1, s["NH"] + 2 * s["NKV"], s["HS"])
    split = np.split(heads, (s["NH"], s["NH"] + s["NKV"]), 1)
    return dict(zip(("dq", "dk", "dv"), split, strict=True))


def run(
    name: str, arrays: dict[str, Any], sizes: dict[str, int], dtype: torch.dtype, device: str
) -> dict[str, np.ndarray[Any, Any]]:
    """A layer in PyTorch; whole numbers, such as tokens, stay exact."""
    tensors = {}
    for key, array in arrays.items():
        x = torch.from_numpy(array.astype(np.float64)).to(device)
        tensors[key] = x if key in ("tokens", "targets") else x.to(dtype)
    outs = LAYERS[name](tensors, sizes)
    return {key: y.detach().double().cpu().numpy().ravel() for key, y in outs.items()}


def main() -> int:
    cases = read(Path(sys.argv[1]))
    names = ("B", "T", "NH", "NKV", "HS", "C", "F", "V")
    sizes = dict(zip(names, map(int, cases.pop("all")["sizes"]), strict=True))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for case, arrays in cases.items():
        exact = run(case, arrays, sizes, torch.float64, "cpu")
        theirs = run(case, arrays, sizes, torch.bfloat16, device)
        for whole in exact:
            ours, wanted, other = (parts(whole, x[whole], sizes) for x in (arrays, exact, theirs))
            for name, want in wanted.items():
                error, torch_error = (
                    float(np.linalg.norm(x[name] - want) / np.linalg.norm(want))
                    for x in (ours, other)
                )
                ok = error <= LIMIT * torch_error + ROUNDING
                result = {"result": f"{case} {name}", "error": error, "torch_error": torch_error}
                results.append({**result, "ok": ok})
    ok = all(r["ok"] for r in results)
    worst = max(results, key=lambda r: r["error"] / (r["torch_error"] + ROUNDING))
    report = {
        "mode": "layers",
        "torch": torch.__version__,
        "device": device,
        "within": sum(r["ok"] for r in results),
        "of": len(results),
        "worst": worst["result"],
        "worst_ratio": round(worst["error"] / (worst["torch_error"] + ROUNDING), 3),
        "results": results,
        "ok": ok,
    }
    print(json.dumps(report))
    for r in results:
        if not r["ok"]:
            text = f"{r['result']}: error {r['error']:.2e}, PyTorch's {r['torch_error']:.2e}"
            print(text, file=sys.stderr)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
