"""Device, dtype and sizes of a model, and its memory plan."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from gptc.engine import library
from gptc.engine.config import GPTConfig
from gptc.engine.lora import Lora
from gptc.errors import EngineError, UsageError
from gptc.settings import option

DEVICES = ("cpu", "cuda")
DTYPES = ("fp32", "bf16", "int8", "int4", "packed")  # the first two also for training all weights
KV_DTYPES = ("auto", "int8")
RECOMPUTE = ("none", "mlp", "block")
OPTIMIZERS = ("adamw", "muon")
WIRES = ("fp32", "bf16", "int8")
MOMENTS = ("fp32", "bf16", "int8")


class BlockRows(NamedTuple):
    """Rows of a matrix that are blocks of a type of GGUF files, as `enum gpt_block` numbers it.

    They follow those of entries before for the same parameter, an index of `config.parameters()`.
    """

    parameter: int
    rows: int
    block: int


# The memory that a struct points to lives as long as the struct.
_kept: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class DeviceOptions:
    """The device options that all commands with a model share."""

    device: str = option(
        "auto",
        "Device; auto = the GPU if there is one.",
        section="Device",
        choices=("auto", *DEVICES),
    )
    dtype: str = option(
        "auto",
        "Data type; bf16 = mixed precision, auto = bf16 if it is faster here.",
        section="Device",
        choices=("auto", *DTYPES[:2]),
    )
    threads: int = option(0, "Number of CPU threads; 0 = one per core.", section="Device", least=0)
    pin: bool = option(False, "Pin each thread to one core.", section="Device")


@dataclass(frozen=True)
class CacheOptions:
    """The options of sessions that all commands share which decode."""

    kv_dtype: str = option(
        "auto",
        "Data type of the KV cache; int8 = half the memory of bf16; auto = that of activations.",
        section="Device",
        choices=KV_DTYPES,
    )


def check_device(device: str) -> None:
    """EngineError for a GPU that is asked for and missing, before files are read for it."""
    if device == "cuda":
        Options(device).resolved()


@dataclass(frozen=True)
class Options:
    """The device, dtype and largest sizes of a model.

    `device` is "auto", "cpu" or "cuda". `dtype` is "fp32", "bf16" (mixed precision: master weights
    stay fp32), "int8" (weights rounded in groups of 32) or "int4" (to Q4_K; both inference only),
    "packed" (the matrices of `blocks` as a GGUF file has them, others in bf16; inference only) or
    "auto": bf16 on a GPU, on a CPU with bf16 instructions, and without `training` on one with AVX2;
    else fp32. `threads` 0 = one per core;
    `pin` pins each thread to a core; `max_seq` None = the block size. With `lora`, training changes
    adapters alone, and takes any dtype. `recompute` names what a training step computes twice, to
    keep less: norms, and the first feed-forward layer ("mlp") or each layer ("block"), of the
    first `recompute_layers` layers; 0 = of all. `kv_dtype` is that of
    its sessions' KV caches: "int8" or "auto", the dtype of activations. `optimizer`
    "muon" trains the matrices of layers by Muon, and the other parameters by AdamW; `muon_rows`
    scales the rows of its steps (NorMuon).
    `label_smoothing` and `z_loss` change the gradient alone: losses stay cross-entropy. With
    `n_shards`, the model has part number `shard` of AdamW's state alone (ZeRO-1), on a CPU. `wire`
    is the form in which ranks send gradients: "fp32", or, on a CPU and with error feedback, "bf16"
    or "int8". `optimizer_dtype` is that in which AdamW's moments are kept: "fp32", "bf16" or "int8"
    (with a scale for each 256).
    """

    device: str = "auto"
    dtype: str = "fp32"
    threads: int = 0
    training: bool = True
    max_batch: int = 8
    max_seq: int | None = None
    dropout: float = 0.0
    seed: int = 0
    pin: bool = False
    blocks: tuple[BlockRows, ...] = ()
    lora: Lora | None = None
    recompute: str = "none"
    kv_dtype: str = "auto"
    optimizer: str = "adamw"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    n_shards: int = 0
    shard: int = 0
    muon_rows: bool = False
    wire: str = "fp32"
    recompute_layers: int = 0
    optimizer_dtype: str = "fp32"

    def resolved(self) -> Options:
        """The options with "auto" resolved for this machine. EngineError for a missing GPU."""
        for name, known in (("device", DEVICES), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value != "auto" and value not in known:
                raise UsageError(
                    f"{name} {value!r} is unknown; it must be one of auto, {', '.join(known)}"
                )
        few = {"recompute": RECOMPUTE, "kv_dtype": KV_DTYPES, "optimizer": OPTIMIZERS}
        few |= {"wire": WIRES, "optimizer_dtype": MOMENTS}
        for name, choices in few.items():
            value = getattr(self, name)
            if value not in choices:
                raise UsageError(
                    f"{name} {value!r} is unknown; it must be one of {', '.join(choices)}"
                )
        device, dtype = self.device, self.dtype
        if device == "auto" and (self.lora or self.kv_dtype == "int8"):
            device = "cpu"  # both have been measured there only
        if device == "auto" and dtype in DTYPES[2:]:
            device = "cpu"  # quantized weights have been measured there only
        problem = None if device == "cpu" else library.gpu().problem
        if device == "cuda" and problem:
            raise EngineError(problem, library.GPT_ERR_DEVICE)
        if device == "auto":
            device = "cpu" if problem else "cuda"
        if device == "cuda" and self.optimizer_dtype != "fp32":
            dtype = self.optimizer_dtype
            raise UsageError(f"optimizer_dtype {dtype!r} is for a CPU; use device 'cpu', or 'fp32'")
        if dtype == "auto":
            dtype = "bf16" if device == "cuda" or self._has_fast_bf16() else "fp32"
        return replace(self, device=device, dtype=dtype)

    def _has_fast_bf16(self) -> bool:
        """Whether bf16 is the faster dtype on this CPU, as measured.

        With AVX2, bf16 numbers are widened as they are read. Text waits for memory and needs half
        as much of it; training waits for products and gains nothing.
        """
        if library.load().lib.gpt_cpu_has_bf16():
            return True
        return not self.training and library.cpu_level() == "avx2"

    def to_c(self) -> Any:
        """A gpt_options *; "auto" must be resolved."""
        from gptc.engine.arrays import whole  # which imports NumPy: help and completion do without

        lib = library.load().lib
        whole(self.threads, "threads")
        struct = library.new_struct(
            "gpt_options",
            device=getattr(lib, f"GPT_DEVICE_{self.device.upper()}"),
            dtype=getattr(lib, f"GPT_DTYPE_{self.dtype.upper()}"),
            n_threads=self.threads,
            pin_threads=int(self.pin),
            training=int(self.training),
            max_batch=self.max_batch,
            max_seq=self.max_seq or 0,
            dropout=self.dropout,
            seed=self.seed,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            n_shards=self.n_shards,
            shard=self.shard,
            muon_rows=int(self.muon_rows),
            wire=WIRES.index(self.wire),
            moments=MOMENTS.index(self.optimizer_dtype),
            recompute=RECOMPUTE.index(self.recompute),
            recompute_layers=self.recompute_layers,
            optimizer=getattr(lib, f"GPT_OPTIMIZER_{self.optimizer.upper()}"),
        )
        if self.lora:
            struct.lora = self.lora.to_c()[0]
        if self.blocks:
            rows = library.load().ffi.new("gpt_block_rows[]", [tuple(b) for b in self.blocks])
            struct.block_rows, struct.n_block_rows = rows, len(self.blocks)
            _kept[struct] = rows
        return struct


@dataclass(frozen=True)
class Plan:
    """A model's memory and arithmetic, known before any allocation. Bytes are exact."""

    n_params: int  # tied ones counted once
    n_active_params: int  # those that a token reads: fewer with experts
    param_bytes: int
    grad_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    workspace_bytes: int
    total_bytes: int  # the sum of those above: one allocation
    library_bytes: int  # further memory of the BLAS library, as measured
    forward_flops_per_token: float  # at T = max_seq
    train_flops_per_token: float
    update_flops: float  # of the products of one update: Muon has them


def plan_for(config: GPTConfig, options: Options | None = None) -> Plan:
    """The plan for a model of this shape; allocates nothing."""
    config.check()
    out = library.load().ffi.new("gpt_plan *")
    settings = (options or Options()).resolved().to_c()
    library.call("gpt_plan_memory", config.to_c(), settings, out)
    return Plan(**{field.name: getattr(out, field.name) for field in fields(Plan)})
