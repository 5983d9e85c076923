"""Sequences being decoded, with their KV cache."""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from gptc.engine import library
from gptc.engine.arrays import FloatArray, TokenArray, as_tokens, floats, ints, whole
from gptc.engine.config import GPTConfig
from gptc.engine.options import KV_DTYPES, Options
from gptc.engine.turns import Turns
from gptc.errors import GptcError, Uncopied, UsageError


class OpenModel(Protocol):
    """What a session needs of its model."""

    config: GPTConfig
    options: Options
    _turns: Turns
    _parts: WeakSet[Any]

    def _open(self) -> Any:
        """The engine's handle. GptcError once the model is closed."""


class AdapterCopy(Uncopied):
    """The numbers that a model's adapters have now, for sequences of its sessions.

    With `none`, an adapter that changes nothing. Garbage collection frees it, or its model's end.
    """

    def __init__(self, model: OpenModel, none: bool = False) -> None:
        ffi, lib, _ = library.load()
        out = ffi.new("gpt_adapter **")
        turns, owner = model._turns, model._open()
        library.check(turns.call("gpt_adapter_create", model._open, int(none), out))

        def free(adapter: Any, _owner: Any = owner) -> None:  # which keeps the model alive
            turns.free(lambda: lib.gpt_adapter_free(adapter) if _owner else None)

        self._handle = ffi.gc(out[0], free)
        self._closed = False
        with turns.lock:
            model._parts.add(self)

    def _release(self) -> None:
        if not self._closed:
            self._closed = True
            library.load().ffi.release(self._handle)

    def _open(self) -> Any:
        if self._closed:
            raise GptcError("the model of this adapter is closed: load both again")
        return self._handle


class Session(Uncopied):
    """Sequences being decoded, with their KV cache. Made by `Model.session`."""

    def __init__(
        self,
        model: OpenModel,
        n_seq: int = 1,
        n_ctx: int | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        ffi, lib, _ = library.load()
        n_seq, n_ctx = whole(n_seq, "n_seq"), whole(n_ctx or 0, "n_ctx")
        kv = _kv_number(model, kv_dtype)
        out = ffi.new("gpt_session **")
        turns, owner = model._turns, model._open()
        library.check(turns.call("gpt_session_create", model._open, n_seq, n_ctx, kv, out))

        # The session must be freed before its model: its destructor keeps the model alive.
        def free(session: Any, _owner: Any = owner) -> None:
            turns.free(lambda: lib.gpt_session_free(session) if _owner else None)

        self._handle = ffi.gc(out[0], free)
        self._model = model
        self._closed = False
        self._adapters: list[AdapterCopy | None] = [None] * n_seq  # none is freed while it is used
        self.n_seq = n_seq
        self.n_ctx = n_ctx or model.config.block_size
        self.kv_dtype = KV_DTYPES[kv]

    def decode(
        self,
        tokens: npt.ArrayLike,
        seq: int | npt.ArrayLike = 0,
        want: npt.ArrayLike | None = None,
    ) -> FloatArray:
        """Appends tokens (N,) and returns logits for the next ones.

        With one sequence number, all tokens belong to it and the logits are (V,). With an array of
        numbers (N,), one per token, the tokens of a sequence must be adjacent, and the logits are
        (number of sequences, V), in order of appearance. With `want` (N,), the logits are (number
        of true values, V): those after each token i for which want[i] is true.
        """
        ids, seqs, flags, n_rows = self._rows(tokens, seq, want)
        out = np.empty((n_rows, self._model.config.vocab_size), np.float32)
        logits = floats(out) if n_rows else self._ffi.NULL
        self._call(
            "gpt_session_decode", ints(ids), ints(seqs), self._flags(flags), len(ids),
            logits,
        )  # fmt: skip
        single = isinstance(seq, int | np.integer)
        return out[0] if single and want is None else out

    def states(
        self,
        tokens: npt.ArrayLike,
        seq: int | npt.ArrayLike = 0,
        want: npt.ArrayLike | None = None,
    ) -> FloatArray:
        """Appends tokens (N,) as `decode` does, and returns states in place of logits.

        A state (C,) is the output of the final norm after a token: transformers' last_hidden_state.
        With one sequence number and without `want`, it is the last one's; else they are (number of
        sequences, C), or (number of true values, C).
        """
        ids, seqs, flags, n_rows = self._rows(tokens, seq, want)
        out = np.empty((n_rows, self._model.config.n_embd), np.float32)
        states = floats(out) if n_rows else self._ffi.NULL
        self._call(
            "gpt_session_states", ints(ids), ints(seqs), self._flags(flags), len(ids), states
        )
        single = isinstance(seq, int | np.integer)
        return out[0] if single and want is None else out

    def sample(
        self,
        tokens: npt.ArrayLike,
        draws: Any,
        seq: int | npt.ArrayLike = 0,
        want: npt.ArrayLike | None = None,
    ) -> None:
        """Appends tokens (N,) as `decode` does, and draws a token in place of each row of logits.

        `draws` is an array of the engine's gpt_draw, one for each row, which also receive the
        results. No logits leave the device.
        """
        ids, seqs, flags, n_rows = self._rows(tokens, seq, want)
        if len(draws) != n_rows:
            raise GptcError(f"{len(draws)} draws for {n_rows} rows; pass as many")
        self._call(
            "gpt_session_sample", ints(ids), ints(seqs), self._flags(flags), len(ids),
            draws,
        )  # fmt: skip

    def _rows(
        self, tokens: npt.ArrayLike, seq: int | npt.ArrayLike, want: npt.ArrayLike | None
    ) -> tuple[TokenArray, TokenArray, npt.NDArray[np.bool_] | None, int]:
        """Tokens (N,), their sequences (N,), which of them are wanted, and the number of these."""
        ids = as_tokens(tokens, "tokens", n_dim=1)
        single = isinstance(seq, int | np.integer)
        seqs = np.full_like(ids, seq) if single else as_tokens(seq, "seq", n_dim=1)
        if seqs.shape != ids.shape:
            raise GptcError(f"{len(ids)} tokens, but {len(seqs)} sequence numbers; pass as many")
        if want is None:
            # The tokens of a sequence are adjacent: a new one starts where the number changes.
            return ids, seqs, None, 1 + int(np.count_nonzero(np.diff(seqs)))
        flags = np.ascontiguousarray(want, bool)
        if flags.shape != ids.shape:
            raise GptcError(f"want has the shape {flags.shape}; it must be {ids.shape}")
        return ids, seqs, flags, int(np.count_nonzero(flags))

    def _flags(self, flags: npt.NDArray[np.bool_] | None) -> Any:
        return self._ffi.NULL if flags is None else self._ffi.from_buffer("uint8_t[]", flags)

    def length(self, seq: int = 0) -> int:
        """Number of tokens in a sequence's cache."""
        length = int(self._value("gpt_session_length", whole(seq, "seq")))
        if length < 0:
            raise GptcError(f"no sequence {seq}: this session has {self.n_seq}")
        return length

    def reachable(self, seq: int, length: int) -> int:
        """`length`, or 0 if `rewind` and `fork` cannot keep so many tokens of a sequence.

        Layers with a window keep only what later tokens see, and 64 tokens before them at least.
        """
        reaches = self._value("gpt_session_reaches", whole(seq, "seq"), whole(length, "length"))
        return length if reaches else 0

    def rewind(self, seq: int = 0, length: int = 0) -> None:
        """Keeps the first `length` tokens of a sequence and drops the others.

        GptcError where `reachable` says 0 for another length.
        """
        seq, length = whole(seq, "seq"), whole(length, "length")
        self._call("gpt_session_rewind", seq, length)

    def fork(self, seq: int, to: int, length: int | None = None) -> None:
        """Copies the first `length` tokens of `seq` to sequence `to`; None = all."""
        with self._model._turns.lock:
            seq, to = whole(seq, "seq"), whole(to, "to")
            n = self.length(seq) if length is None else whole(length, "length")
            self._call("gpt_session_fork", seq, to, n)

    def adapt(self, seq: int, adapter: AdapterCopy | None) -> None:
        """Lets the tokens that follow in a sequence go through an adapter; None = the model's own.

        A step may have sequences of several adapters. What the sequence holds stays.
        """
        with self._model._turns.lock:
            seq = whole(seq, "seq")
            handle = adapter._open() if adapter else self._ffi.NULL
            self._call("gpt_session_adapt", seq, handle)
            self._adapters[seq] = adapter

    def close(self) -> None:
        """Frees the session, after the call under way; twice is harmless."""
        self._model._turns.close(self._release)

    def _release(self) -> None:
        if not self._closed:
            self._closed = True
            self._ffi.release(self._handle)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def vocab_size(self) -> int:
        """Number of logits in a row."""
        return self._model.config.vocab_size

    @property
    def _ffi(self) -> Any:
        return library.load().ffi

    def _call(self, function: str, *arguments: Any) -> None:
        library.check(self._value(function, *arguments))

    def _value(self, function: str, *arguments: Any) -> Any:
        return self._model._turns.call(function, self._open, *arguments)

    def _open(self) -> Any:
        self._model._open()
        if self._closed:
            raise GptcError("this session is closed; create a new one with model.session()")
        return self._handle


def session_bytes(
    model: OpenModel, n_seq: int = 1, n_ctx: int | None = None, kv_dtype: str | None = None
) -> int:
    """Number of bytes that a session of this size allocates."""
    out = library.load().ffi.new("uint64_t *")
    sizes = whole(n_seq, "n_seq"), whole(n_ctx or 0, "n_ctx"), _kv_number(model, kv_dtype)
    library.check(model._turns.call("gpt_session_bytes", model._open, *sizes, out))
    return int(out[0])


def _kv_number(model: OpenModel, kv_dtype: str | None) -> int:
    """The enum gpt_kv of a name; None = the model's. UsageError for an unknown one."""
    name = model.options.kv_dtype if kv_dtype is None else kv_dtype
    if name not in KV_DTYPES:
        raise UsageError(f"kv_dtype {name!r} is unknown; it must be one of {', '.join(KV_DTYPES)}")
    return KV_DTYPES.index(name)
