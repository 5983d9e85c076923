"""A model: its parameters, training step and logits, and sessions that decode with a KV cache.

B is the batch size, T the sequence length, V the vocabulary size. Input arrays are checked, and
converted only without loss; output arrays are copies. Threads may share a model and its sessions:
a call waits for the one under way.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from gptc.engine import levels, library
from gptc.engine.arrays import (
    FloatArray,
    TokenArray,
    as_pair,
    as_parameter,
    as_tokens,
    count_targets,
    floats,
    ints,
    micro_batches,
    number,
    whole,
)
from gptc.engine.config import GPTConfig
from gptc.engine.lora import Lora
from gptc.engine.optim import AdamW, Muon
from gptc.engine.options import BlockRows, Options, plan_for
from gptc.engine.session import AdapterCopy, Session
from gptc.engine.turns import Turns
from gptc.errors import GptcError, Uncopied, UsageError

if TYPE_CHECKING:
    pass


_Model = TypeVar("_Model", bound="Model")
STATES = ("moment1", "moment2", "momentum", "row_moment")


class StepResult(NamedTuple):
    """A training step's loss before the update (nats), and its gradient's global norm."""

    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Share:
    """The part of a rank in a step of several."""

    n_targets: int  # of all ranks
    places: Sequence[tuple[int, int]]  # of each micro-batch: its number in the step, its first row
    meet: Callable[[], None]  # adds the gradients of all ranks
    begin: Callable[[], None] = lambda: None  # comes before the last backward, if there is one
    after: Callable[[], None] = lambda: None  # follows the update


@dataclass(frozen=True)
class OpTime:
    """The cost of an op at one shape, summed over its calls."""

    name: str
    calls: int
    seconds: float
    flops: float  # of its GEMMs
    bytes: float  # least number of bytes to read and write


@dataclass(frozen=True)
class ProductTime:
    """The plan and the cost of a GEMM of the device's library at one shape."""

    name: str  # "a b^T 65536 x 2304 x 768": rows, columns, terms of a sum
    epilogue: str  # "bias", "gelu, bias", ...; "" for none
    plan: str  # the library's algorithm and its settings
    problem: str  # why it may be slow; "" if nothing is known
    calls: int
    seconds: float
    flops: float
    bytes: float


class NotFinite(NamedTuple):
    """A number that is not finite, in an output of an op."""

    op: str  # such as "attention_forward"
    tensor: str  # the field of csrc/ops.h
    layer: int | None  # None: outside of layers
    at: int  # index in the tensor
    value: float


class Profile(NamedTuple):
    """The time of a block: by op, by GEMM of the device's library, and the busy time of threads."""

    ops: list[OpTime]
    products: list[ProductTime]
    busy_s: list[float]


def _measure_levels() -> None:
    """Times ops of a common shape on both levels of a CPU with AMX: a fraction of a second."""
    shape = GPTConfig.preset("gpt2", n_layer=1, n_head=4, n_embd=256, vocab_size=512)
    with Model.create(shape, device="cpu", dtype="bf16", max_batch=2, max_seq=128) as model:
        tokens = np.zeros((2, 128), np.int32)
        levels.measure(lambda: model.train_step(tokens, tokens, lr=0))


class Model(Uncopied):
    """A GPT on a device, made by `create` or `load`. Garbage collection closes it."""

    def __init__(self, config: GPTConfig, options: Options) -> None:
        """Allocates a model whose parameters are zero; `create` and `load` fill them."""
        ffi, lib, _ = library.load()
        if not isinstance(config, GPTConfig):
            raise UsageError(
                f"the model's config is {config!r}; it must be a GPTConfig, such as "
                'GPTConfig.preset("tiny", vocab_size=256)'
            )
        config.check()
        self.config = config
        self.options = options.resolved()
        self.plan = plan_for(config, self.options)
        if self.options.device == "cpu" and self.options.dtype != "fp32":
            levels.restore(_measure_levels)
        out = ffi.new("gpt_model **")
        library.call("gpt_model_create", config.to_c(), self.options.to_c(), out)
        self._handle = ffi.gc(out[0], lib.gpt_model_free)
        self._closed = False
        self.comm: Any = None
        """The ranks that have the parts of a sharded state: a gpt_comm."""
        lora = self.options.lora
        adapters = lora.parameters(config) if lora else ()
        every = (*config.parameters(), *adapters)
        self._parameters = {p.name: (i, p.shape) for i, p in enumerate(every)}
        self.trained = adapters or every
        """The parameters that training changes: the adapters, or all."""
        self._turns = Turns()
        self._parts: weakref.WeakSet[Session | AdapterCopy] = weakref.WeakSet()

    @classmethod
    def create(
        cls: type[_Model],
        config: GPTConfig,
        *,
        device: str = "auto",
        dtype: str = "fp32",
        threads: int = 0,
        training: bool = True,
        max_batch: int = 8,
        max_seq: int | None = None,
        dropout: float = 0.0,
        seed: int = 0,
        pin: bool = False,
        blocks: Sequence[BlockRows] = (),
        lora: Lora | None = None,
        recompute: str = "none",
        kv_dtype: str = "auto",
        optimizer: str = "adamw",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        muon_rows: bool = False,
        recompute_layers: int = 0,
        optimizer_dtype: str = "fp32",
        init: bool = True,
    ) -> _Model:
        """A new model with random weights from `seed`; without `init` they are zero.

        `max_batch` and `max_seq` are the largest B and T of logits, loss and backward. `blocks`
        names the matrices of the dtype "packed" that `write_blocks` gives. Those from `lora` on are
        as in `Options`.
        """
        sizes, given = (training, max_batch, max_seq), tuple(blocks)
        options = Options(
            device, dtype, threads, *sizes, dropout, seed, pin, given, lora, recompute,
            kv_dtype, optimizer, label_smoothing, z_loss, muon_rows=muon_rows,
            recompute_layers=recompute_layers, optimizer_dtype=optimizer_dtype,
        )  # fmt: skip
        model = cls(config, options)
        if init:
            model.init(seed)
        return model

    def init(self, seed: int = 0) -> None:
        """Draws random weights as GPT-2 does; they depend on the seed alone."""
        self._call("gpt_model_init", whole(seed, "seed"))

    def init_adapters(self, seed: int = 0) -> None:
        """Draws the adapters alone as peft does: A uniform within 1 / sqrt(in), B zero.

        Magnitudes (DoRA) are the lengths of the rows that the model has now.
        """
        self._call("gpt_model_init_lora", whole(seed, "seed"))

    # ---- parameters ----

    def parameters(self) -> dict[str, FloatArray]:
        """A copy of every parameter by name; linear weights are (out, in)."""
        return {name: self.get(name) for name in self._parameters}

    def gradients(self) -> dict[str, FloatArray]:
        """A copy of the gradient of every parameter that is trained, by name."""
        return {p.name: self.read(p.name, "grad") for p in self.trained}

    def get(self, name: str) -> FloatArray:
        """A copy of one parameter."""
        return self.read(name, "value")

    def set(self, name: str, values: npt.ArrayLike) -> None:
        """Sets a parameter to an array of its shape."""
        self.write(name, "value", values)

    def lend(self, name: str, descriptor: int, offset: int, transposed: bool = False) -> None:
        """As `set`, from an open file, which has the values as float32 from byte `offset` on.

        With `transposed` the file has the matrix column by column. Nothing is copied on the way
        where that can be. The file must not change: if possible the model keeps no copy, and reads
        rows from it, so that a model for inference has its embedding in its file. EngineError of
        the status GPT_ERR_FILE where the file ends before.
        """
        index, shape = self._find(name)
        kept = self._ffi.new("int *")
        self._call("gpt_model_lend", index, math.prod(shape), descriptor, offset, transposed, kept)

    def write_blocks(self, name: str, part: int, blocks: npt.NDArray[np.uint8]) -> None:
        """Sets rows of a parameter: those of its entry number `part` in the option `blocks`.

        `blocks` are the bytes of a GGUF file, row by row. They are kept without rounding.
        """
        index, _ = self._find(name)
        data = np.ascontiguousarray(blocks, np.uint8)
        raw = self._ffi.from_buffer(data)
        self._call("gpt_model_write_blocks", index, whole(part, "part"), raw, data.nbytes)

    def read(self, name: str, tensor: str, out: FloatArray | None = None) -> FloatArray:
        """A copy of a parameter's "value", "grad", or one of `states`; in `out` if given.

        With the option `wire` there is also its "residual": gradients that were not sent.

        EngineError for a matrix of an inference model in bf16, int8 or int4: it is rounded. A
        sharded state comes from all ranks, which have to call this together.
        """
        index, shape = self._find(name)[0], self.state_shape(name, tensor)
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise GptcError(
                f"out has the shape {out.shape} of {out.dtype}; {name} needs {shape} of float32, "
                "in C order"
            )
        which = self._tensor(tensor)
        slot = which - self._lib.GPT_TENSOR_STATE0
        is_state = tensor in STATES
        if is_state and self.comm is not None and self.options.n_shards > 1:
            self._call("gpt_model_gather_state", self.comm, index, slot, floats(out), out.size)
            return out
        self._call("gpt_model_read", index, which, floats(out), out.size)
        return out

    def states(self, name: str) -> tuple[str, ...]:
        """The state of a parameter's optimizer: AdamW's two moments, or Muon's momentum.

        With `muon_rows`, Muon also has the averages of rows, "row_moment".
        """
        index, shape = self._find(name)
        n_states = self._value("gpt_model_state_count", index)
        if n_states == 2 and self._value("gpt_model_state_size", index, 1) != math.prod(shape):
            return STATES[2:]
        return {2: STATES[:2], 1: STATES[2:3]}.get(n_states, ())

    def state_shape(self, name: str, tensor: str) -> tuple[int, ...]:
        """The shape of a parameter's "value", "grad" or one of `states`."""
        shape = self._find(name)[1]
        return shape[:1] if tensor == "row_moment" else shape

    def write(self, name: str, tensor: str, values: npt.ArrayLike) -> None:
        """Sets a parameter's "value", "grad", "residual", or one of `states`."""
        index, shape = self._find(name)[0], self.state_shape(name, tensor)
        array = as_parameter(name, values, shape)
        which = self._tensor(tensor)
        self._call("gpt_model_write", index, which, floats(array), array.size)

    # ---- training and evaluation ----

    def train_step(
        self,
        inputs: npt.ArrayLike | Sequence[npt.ArrayLike],
        targets: npt.ArrayLike | Sequence[npt.ArrayLike],
        *,
        positions: npt.ArrayLike | Sequence[npt.ArrayLike] | None = None,
        lr: float,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        grad_clip: float = 1.0,
        momentum: float = 0.95,
        muon: Muon | None = None,
        check: Callable[[], None] = lambda: None,
        share: Share | None = None,
    ) -> StepResult:
        """One optimizer step on inputs (B, T) and targets (B, T), or on lists of micro-batches.

        The loss is the mean over all targets that are not -1, of all micro-batches together; one
        without a target is passed over. `positions` are as many as inputs, as `backward` takes
        them. `muon` has the settings of the optimizer "muon"; None: AdamW's, and `momentum`.
        `check` is called before each; an exception from it drops the step and leaves the model
        unchanged. UsageError without any target. With a `share`, they are a rank's part of a step
        of several ranks.
        """
        batches = micro_batches(inputs, "inputs")
        wanted = micro_batches(targets, "targets")
        places = (
            [None] * len(batches) if positions is None else micro_batches(positions, "positions")
        )
        for values, what in (wanted, "targets"), (places, "positions"):
            if len(batches) != len(values):
                raise GptcError(
                    f"{len(batches)} micro-batches of inputs, {len(values)} of {what}; pass as many"
                )
        n_targets = [count_targets(y) for y in wanted]
        if not (n_all := share.n_targets if share else sum(n_targets)):
            raise UsageError("all targets are -1; a step needs at least one")
        last = max((i for i, n in enumerate(n_targets) if n), default=None)
        # No loss is read here, so that only the update waits for the device.
        with self._turns.lock:
            try:
                for i, (x, y, at) in enumerate(zip(batches, wanted, places, strict=True)):
                    check()
                    if share and n_targets[i]:
                        if i == last:
                            share.begin()
                        self._call("gpt_model_place", *share.places[i])
                    if n_targets[i]:
                        self._backward(x, y, at, n_targets[i] / n_all, self._ffi.NULL)
                if share:
                    share.meet()
            except BaseException:
                self.zero_gradients()
                raise
            adamw = AdamW(lr, beta1, beta2, eps, weight_decay, grad_clip)
            same = Muon(lr, momentum, weight_decay, grad_clip)
            result = self._update(adamw, muon or same)
            if share:
                share.after()
            return result

    def backward(
        self,
        inputs: npt.ArrayLike,
        targets: npt.ArrayLike,
        scale: float = 1.0,
        positions: npt.ArrayLike | None = None,
    ) -> float:
        """Adds `scale` times the loss's gradient to the gradients; returns the loss, in nats.

        A sequence may hold several documents, with `positions` (B, T) of the tokens in theirs: 0
        where one begins, and else 1 more than before. A token attends to its own document alone.
        """
        scale, loss = number(scale, "scale"), self._ffi.new("float *")
        self._backward(inputs, targets, positions, scale, loss)
        return float(loss[0])

    def backward_weighted(
        self,
        inputs: npt.ArrayLike,
        targets: npt.ArrayLike,
        weigh: Callable[[FloatArray], npt.ArrayLike],
        positions: npt.ArrayLike | None = None,
    ) -> FloatArray:
        """Adds the gradient of a weighted sum of losses to the gradients; returns the losses.

        `weigh` gets the cross-entropy in nats of each position (B, T), 0 where the target is -1, as
        the training pass gives it, and returns their weights (B, T). So a loss that is a function
        of them has its gradient by its derivatives.
        """
        x, y = map(self._room, as_pair(inputs, targets))
        losses = np.empty(x.shape, np.float32)
        with self._documents(x, positions):
            self._call("gpt_model_forward", ints(x), ints(y), *x.shape, floats(losses))
            weights = np.ascontiguousarray(weigh(losses), np.float32)
            if weights.shape != x.shape:
                raise GptcError(
                    f"weights have the shape {weights.shape}, inputs {x.shape}; they must agree"
                )
            self._call("gpt_model_backward_weighted", floats(weights), *x.shape)
        return losses

    def update(self, adamw: AdamW, muon: Muon | None = None) -> float:
        """Clips and applies the gradients; returns their norm before clipping.

        `muon` has the settings of the optimizer "muon"; None: AdamW's rate, decay and clipping.
        """
        same = Muon(adamw.lr, weight_decay=adamw.weight_decay, grad_clip=adamw.grad_clip)
        return self._update(adamw, muon or same).grad_norm

    def _backward(
        self,
        inputs: npt.ArrayLike,
        targets: npt.ArrayLike,
        positions: npt.ArrayLike | None,
        scale: float,
        loss: Any,
    ) -> None:
        x, y = map(self._room, as_pair(inputs, targets))
        with self._documents(x, positions):
            self._call("gpt_model_backward", ints(x), ints(y), *x.shape, scale, loss)

    def _update(self, adamw: AdamW, muon: Muon) -> StepResult:
        settings = self._ffi.new("gpt_optimizer[2]")
        settings[0].kind = self._lib.GPT_OPTIMIZER_ADAMW
        settings[0].adamw = library.new_struct("gpt_adamw", **vars(adamw))[0]
        settings[1].kind = self._lib.GPT_OPTIMIZER_MUON
        settings[1].muon = library.new_struct("gpt_muon", **vars(muon))[0]
        loss, norm = self._ffi.new("float *"), self._ffi.new("float *")
        self._call("gpt_model_update", settings, len(settings), loss, norm)
        return StepResult(float(loss[0]), float(norm[0]))

    def begin_all_reduce(self, comm: Any) -> None:
        """The next backward is the last one before `all_reduce`, which has to follow.

        Sums of its gradients are made meanwhile.
        """
        self._call("gpt_model_begin_all_reduce", comm)

    def all_reduce(self, comm: Any) -> None:
        """Adds the gradients of all ranks, and their losses since the last update."""
        self._call("gpt_model_all_reduce", comm)

    def gather(self) -> None:
        """After an update with a sharded state: each rank gets the parameters of all."""
        self._call("gpt_model_gather", self.comm)

    def zero_gradients(self) -> None:
        """Sets the gradients to zero."""
        self._call("gpt_model_zero_grads")

    def loss(
        self,
        inputs: npt.ArrayLike,
        targets: npt.ArrayLike,
        positions: npt.ArrayLike | None = None,
    ) -> float:
        """Mean cross-entropy in nats over the targets (B, T) that are not -1."""
        x, y = map(self._room, as_pair(inputs, targets))
        loss = self._ffi.new("float *")
        with self._documents(x, positions):
            self._call("gpt_model_loss", ints(x), ints(y), *x.shape, loss, self._ffi.NULL)
        return float(loss[0])

    def losses(
        self,
        inputs: npt.ArrayLike,
        targets: npt.ArrayLike,
        positions: npt.ArrayLike | None = None,
        *,
        training: bool = False,
    ) -> FloatArray:
        """Cross-entropy in nats at every position: (B, T); 0 where the target is -1.

        With `training` they are those of a training pass, with dropout, and without the rounding of
        activations over quantized weights.
        """
        x, y = map(self._room, as_pair(inputs, targets))
        out = np.empty(x.shape, np.float32)
        mean = self._ffi.new("float *")
        with self._documents(x, positions):
            if training:
                self._call("gpt_model_forward", ints(x), ints(y), *x.shape, floats(out))
                return out
            self._call("gpt_model_loss", ints(x), ints(y), *x.shape, mean, floats(out))
        return out

    @contextmanager
    def _documents(self, x: TokenArray, positions: npt.ArrayLike | None) -> Iterator[None]:
        """The call within has this model for itself, and these positions, if any, in documents."""
        with self._turns.lock:
            if positions is not None:
                at = as_tokens(positions, "positions")
                if at.shape != x.shape:
                    raise GptcError(
                        f"positions have the shape {at.shape}, inputs {x.shape}; they must agree"
                    )
                self._call("gpt_model_documents", ints(at), *at.shape)
            yield

    def logits(self, tokens: npt.ArrayLike) -> FloatArray:
        """Logits (B, T, V) of tokens (B, T)."""
        x = self._room(as_tokens(tokens, "tokens"))
        out = np.empty((*x.shape, self.config.vocab_size), np.float32)
        self._call("gpt_model_logits", ints(x), *x.shape, floats(out))
        return out

    def _room(self, x: TokenArray) -> TokenArray:
        """Returns x (B, T). UsageError if B is above `max_batch`."""
        most = self.options.max_batch
        if len(x) > most:
            raise UsageError(
                f"batch size {len(x)}; the model was created for 1 to {most}: pass "
                f"max_batch={len(x)} when you create or load it"
            )
        return x

    def session(
        self, n_seq: int = 1, n_ctx: int | None = None, kv_dtype: str | None = None
    ) -> Session:
        """A KV cache for `n_seq` sequences of at most `n_ctx` tokens (None: the block size).

        `kv_dtype` is "int8" or "auto", as `Options` says; None = the model's.
        """
        session = Session(self, n_seq, n_ctx, kv_dtype)
        with self._turns.lock:
            self._parts.add(session)
        return session

    # ---- state ----

    @property
    def step(self) -> int:
        """Updates done so far; AdamW's bias correction and dropout depend on it."""
        return int(self._value("gpt_model_step"))

    @step.setter
    def step(self, value: int) -> None:
        self._call("gpt_model_set_step", whole(value, "step"))

    @property
    def device(self) -> str:
        """The model's device: "cpu" or "cuda"."""
        return self.options.device

    @property
    def dtype(self) -> str:
        """The dtype of its arithmetic: "fp32", "bf16", "int8", "int4" or "packed"."""
        return self.options.dtype

    @property
    def threads(self) -> int:
        """Number of CPU threads."""
        return int(self._value("gpt_model_threads"))

    def peak_flops(self) -> float:
        """Measured peak of this machine in this dtype, in floating-point operations a second."""
        flops = self._ffi.new("double *")
        self._call("gpt_model_peak", flops, self._ffi.NULL)
        return float(flops[0])

    def peak_bytes(self) -> float:
        """Measured memory bandwidth of a copy: bytes read and written a second."""
        flops, copied = self._ffi.new("double *"), self._ffi.new("double *")
        self._call("gpt_model_peak", flops, copied)
        return float(copied[0])

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Times every op within the block. The profile is filled when the block ends."""
        profile = Profile([], [], [])
        self._call("gpt_model_profile", 1)
        try:
            yield profile
            out, seconds = self._ffi.new("gpt_op_time *"), self._ffi.new("double *")
            while not self._value("gpt_model_profile_read", len(profile.ops), out):
                name = self._ffi.string(out.name).decode()
                profile.ops.append(OpTime(name, out.calls, out.seconds, out.flops, out.bytes))
            profile.products.extend(self._products())
            for thread in range(self.threads):
                self._call("gpt_model_profile_busy", thread, seconds)
                profile.busy_s.append(float(seconds[0]))
        finally:
            self._call("gpt_model_profile", 0)

    def check_ops(self, on: bool = True) -> None:
        """From now on, or no longer, looks at the outputs of every op, which takes time."""
        self._call("gpt_model_profile", self._lib.GPT_PROFILE_CHECKED if on else 0)

    def not_finite(self) -> NotFinite | None:
        """The first number in an output of an op, since `check_ops`, that is not finite."""
        out = self._ffi.new("gpt_not_finite *")
        if self._value("gpt_model_not_finite", out):
            return None
        op, tensor = (self._ffi.string(text).decode() for text in (out.op, out.tensor))
        layer = None if out.layer < 0 else int(out.layer)
        return NotFinite(op, tensor, layer, int(out.index), float(out.value))

    def _products(self) -> Iterator[ProductTime]:
        """What was measured of the library's GEMMs."""
        out, text = self._ffi.new("gpt_product_time *"), self._ffi.string
        i = 0
        while not self._value("gpt_model_profile_product", i, out):
            yield ProductTime(
                name=text(out.name).decode(),
                epilogue=text(out.epilogue).decode(),
                plan=text(out.plan).decode(),
                problem=text(out.problem).decode(),
                calls=out.calls,
                seconds=out.seconds,
                flops=out.flops,
                bytes=out.bytes,
            )
            i += 1

    def close(self) -> None:
        """Frees the model and its sessions, after the call under way; twice is harmless."""
        self._turns.close(self._release)

    def _release(self) -> None:
        if self._closed:
            return
        for part in list(self._parts):
            part._release()
        self._closed = True
        self._ffi.release(self._handle)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.device}, {self.dtype}"
        return f"<gptc.Model {self.config.family}, {self.plan.n_params:,} parameters, {state}>"

    @property
    def _ffi(self) -> Any:
        return library.load().ffi

    @property
    def _lib(self) -> Any:
        return library.load().lib

    def _open(self) -> Any:
        if self._closed:
            raise GptcError("this model is closed; create or load a new one")
        return self._handle

    def _call(self, function: str, *arguments: Any) -> None:
        library.check(self._value(function, *arguments))

    def _value(self, function: str, *arguments: Any) -> Any:
        return self._turns.call(function, self._open, *arguments)

    def _find(self, name: str) -> tuple[int, tuple[int, ...]]:
        if not isinstance(name, str):
            raise GptcError(f"name is {name!r}; it must be that of a parameter")
        if name not in self._parameters:
            known = ", ".join(list(self._parameters)[:3])
            raise GptcError(f"unknown parameter {name!r}; known are {known}, …")
        return self._parameters[name]

    def _tensor(self, name: str) -> int:
        lib = self._lib
        states = dict.fromkeys(("moment1", "momentum"), lib.GPT_TENSOR_STATE0)
        states |= dict.fromkeys(("moment2", "row_moment"), lib.GPT_TENSOR_STATE0 + 1)
        tensors = {"value": lib.GPT_TENSOR_VALUE, "grad": lib.GPT_TENSOR_GRAD, **states}
        tensors["residual"] = lib.GPT_TENSOR_RESIDUAL
        if name not in tensors:
            raise GptcError(f"unknown tensor {name!r}; known: {', '.join(tensors)}")
        return int(tensors[name])
