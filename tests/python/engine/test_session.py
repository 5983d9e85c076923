"""A session gives the logits of the whole text, in any order of tokens and sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from gptc import Model
from gptc.engine import library
from gptc.engine.config import GPTConfig
from gptc.engine.options import Options
from gptc.engine.session import session_bytes
from gptc.errors import EngineError, GptcError, UsageError
from gptc.files.memory import resident_bytes
from small_models import batch, varied

Config = Callable[..., GPTConfig]


@pytest.fixture(params=["fp32", "bf16"])
def writer(config: Config, request: pytest.FixtureRequest) -> Iterator[Model]:
    with varied(config(), dtype=request.param) as model:
        yield model


def test_caches_take_memory_as_their_texts_get_longer(config: Config) -> None:
    """Not at once, and not two megabytes for each head, as huge pages would."""
    n_seq = 24
    with Model.create(config(block_size=8192), threads=1, max_batch=0, training=False) as model:
        size = session_bytes(model, n_seq)
        before = resident_bytes()
        with model.session(n_seq) as session:
            session.decode([1] * n_seq, list(range(n_seq)))
            taken = resident_bytes() - before
    assert size > 100e6
    assert taken < size / 4


def test_logits_after_chosen_tokens(writer: Model) -> None:
    tokens = np.array([5, 6, 7, 8, 9, 1, 2])
    seqs = np.array([0, 0, 0, 0, 0, 1, 1])
    whole = writer.logits(tokens[None, :5])[0]
    with writer.session(2) as session:
        some = session.decode(tokens, seqs, [True, False, True, False, True, False, False])
        np.testing.assert_allclose(some, whole[[0, 2, 4]], atol=0.05)
        none = session.decode([3], 0, [False])
        assert none.shape == (0, 256)
        assert session.length(0) == 6
        session.fork(0, 1, 5)
        assert session.length(1) == 5
        session.fork(0, 1)
        np.testing.assert_array_equal(session.decode([4], 0), session.decode([4], 1))
        with pytest.raises(GptcError, match="want has the shape"):
            session.decode([1, 2], 0, [True])


@pytest.mark.parametrize("family", ["gpt2", "llama", "byte"])
def test_a_session_gives_the_logits_of_the_whole(config: Config, family: str) -> None:
    x, _ = batch(B=2, T=12)
    with Model.create(config(family), threads=2, max_batch=2, max_seq=12) as model:
        expected = model.logits(x)
        with model.session(n_seq=2) as session:
            first = session.decode(x[0, :5])  # several tokens at once
            assert np.allclose(first, expected[0, 4], atol=1e-4)
            for t in range(5, 12):  # then one by one
                assert np.allclose(session.decode(x[0, t : t + 1]), expected[0, t], atol=1e-4)
            both = session.decode(x[1, :12], np.full(12, 1))
            assert both.shape == (1, 256)
            assert np.allclose(both[0], expected[1, 11], atol=1e-4)
            assert [session.length(0), session.length(1)] == [12, 12]
            session.rewind(0, 6)
            again = session.decode(x[:, 6], [0, 1])
            assert np.allclose(again[0], expected[0, 6], atol=1e-4)
            assert [session.length(0), session.length(1)] == [7, 13]


def test_session_errors(model: Model) -> None:
    with pytest.raises(EngineError, match="n_ctx is 49"):
        model.session(1, 49)
    session = model.session(2, 8)
    with pytest.raises(EngineError, match="sequence 2"):
        session.decode([1, 2], 2)
    with pytest.raises(GptcError, match="no sequence 5: this session has 2"):
        session.length(5)
    with pytest.raises(GptcError, match="3 tokens, but 2 sequence numbers"):
        session.decode([1, 2, 3], [0, 1])
    with pytest.raises(EngineError, match="are not neighbours"):
        session.decode([1, 2, 3], [0, 1, 0])
    with pytest.raises(EngineError, match="sequence 0"):
        session.decode(np.zeros(9, np.int32))
    assert session.length(0) == 0
    assert session_bytes(model, 2, 8) > 0


def test_an_int8_cache_takes_half_of_the_memory(config: Config) -> None:
    shape = config(block_size=1024, n_embd=128, n_head=2)
    with varied(shape, dtype="bf16") as model:
        cache = 2 * shape.n_layer * 64 * 1024 * shape.n_embd
        sizes = {kind: session_bytes(model, 64, kv_dtype=kind) for kind in ("auto", "int8")}
        scales = 2 * shape.n_layer * 64 * 1024 * shape.n_head * 4
        saved = sizes["auto"] - sizes["int8"]
        assert saved == pytest.approx(cache - scales, abs=256 * 8)
        assert model.session(2).kv_dtype == "auto"
        assert model.session(2, kv_dtype="int8").kv_dtype == "int8"
        with pytest.raises(UsageError, match="kv_dtype 'int4' is unknown; it must be one of auto"):
            model.session(2, kv_dtype="int4")
    with varied(config(), kv_dtype="int8") as model:
        assert session_bytes(model, 4) == session_bytes(model, 4, kv_dtype="int8")
        assert session_bytes(model, 4) < session_bytes(model, 4, kv_dtype="auto")
        assert model.session().kv_dtype == "int8"


def test_an_int8_cache_is_on_a_gpu_if_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = library.gpu()._replace(problem=None)
    monkeypatch.setattr(library, "gpu", lambda: found)
    assert Options(device="auto", kv_dtype="int8").resolved().device == "cpu"
    assert Options(device="cuda", kv_dtype="int8").resolved().device == "cuda"
    with pytest.raises(UsageError, match="kv_dtype 'fp8' is unknown"):
        Options(kv_dtype="fp8").resolved()
