"""Quantized matrices of GGUF files stay as they are stored, in memory and in products.

The class of fault: a matrix that is widened unasked, rows of heads in another order, tensors of one
parameter that change places, a type that is computed as another.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptc import GPTConfig, Model
from gptc.checkpoint.facade import load_model
from gptc.cli.info import describe
from gptc.engine import library
from gptc.errors import EngineError, GptcError, UsageError
from gptc.formats.blocks import BLOCKS, Blocks
from gptc.formats.gguf import GgufModel
from packed_models import CONFIG, MIXED, write_gguf
from small_models import make_checkpoint, make_config

TOKENS = np.random.default_rng(2).integers(0, 96, (1, 40)).astype(np.int32)


def difference(file: GgufModel, dtype: str) -> float:
    """How far the logits are from those of the fp32 model, in parts of their norm."""
    with load_model(file, dtype="fp32") as wide, load_model(file, dtype=dtype) as model:
        expected, got = wide.logits(TOKENS), model.logits(TOKENS)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_logits_are_those_of_the_numbers_in_the_file(tmp_path: Path, kind: Blocks) -> None:
    """Activations are rounded to 8 bits, of the largest of 32, and to bf16; weights are not.

    A product then has an error of about 0.6 %; nine follow one another, mostly in branches. bf16
    alone makes half of the difference.
    """
    file = write_gguf(tmp_path / "m.gguf", {}, kind.name)
    assert difference(file, "packed") < 0.04


def test_rounding_4_bits_again_is_further_off(tmp_path: Path) -> None:
    """The bound above is one that weights of the wrong numbers do not keep."""
    assert difference(write_gguf(tmp_path / "m.gguf", {}, "Q5_0"), "int4") > 0.1


def test_types_of_a_parameter_may_differ(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", MIXED, "Q4_K")
    assert difference(file, "packed") < 0.04
    with load_model(file) as model:
        assert model.dtype == "packed"
        for name, _, _ in CONFIG.parameters():
            assert np.array_equal(model.get(name), file.read(name)), name
        sizes = sum(size for _, size in file.types().values())
        assert model.plan.param_bytes < 1.06 * sizes


def test_a_matrix_of_floats_among_blocks_is_bf16(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", {"ffn_down": "F16", "attn_k": "F16"}, "Q8_0")
    assert difference(file, "packed") < 0.04
    with load_model(file, dtype="packed") as model:
        assert np.array_equal(model.get("h.1.mlp.fc.weight"), file.read("h.1.mlp.fc.weight"))
        with pytest.raises(EngineError, match="only in packed form"):
            model.get("h.1.mlp.proj.weight")


def test_decoding_and_logits_agree(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", MIXED, "Q4_K")
    with load_model(file) as model, model.session(1, 48) as session:
        whole = model.logits(TOKENS)[0]
        steps = [session.decode(TOKENS[0, :30])]
        steps += [session.decode(TOKENS[0, i : i + 1]) for i in range(30, 40)]
    assert np.linalg.norm(np.array(steps) - whole[29:]) < 0.04 * np.linalg.norm(whole[29:])


def test_blocks_are_widened_only_when_asked(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", {}, "Q4_0")
    for options, dtype in (({}, "packed"), ({"dtype": "auto"}, "packed"), ({"dtype": "bf16"},) * 2):
        with load_model(file, device="cpu", **options) as model:
            assert model.dtype == (dtype if isinstance(dtype, str) else "bf16")
    with load_model(file, dtype="fp32", training=True) as model:
        assert model.dtype == "fp32"
    with load_model(file) as model, pytest.raises(EngineError, match="is kept as blocks"):
        model.set("wte.weight", np.zeros((96, 256), np.float32))


def test_blocks_stay_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def create(config: GPTConfig, **options: object) -> Model:
        given.update(options)
        raise GptcError("no card is needed")

    found = library.gpu()._replace(problem=None)
    monkeypatch.setattr(library, "gpu", lambda: found)
    monkeypatch.setattr(Model, "create", create)
    file = write_gguf(tmp_path / "m.gguf", MIXED, "Q4_K")
    for device in ("auto", "cuda"):
        with pytest.raises(GptcError, match="no card"):
            load_model(file, device=device)
        assert (given["device"], given["dtype"]) == ("cuda", "packed")
        assert given["blocks"] == file.packing()


def test_a_file_without_blocks_cannot_be_packed(tmp_path: Path) -> None:
    source = make_checkpoint(make_config("llama"), folder=tmp_path / "source")
    with pytest.raises(UsageError, match="has no quantized matrices: choose another dtype"):
        load_model(source, dtype="packed")


def test_a_scale_that_is_not_finite_is_named(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", {}, "Q4_K")
    at = file.tensors.entries["blk.1.attn_k.weight"].offset + 7 * 144
    with file.path.open("r+b") as opened:
        opened.seek(at + 2)
        opened.write(np.float16(np.inf).tobytes())
    with pytest.raises(GptcError, match=r"blk.1.attn_k.weight at byte .* block 7 is not finite"):
        load_model(GgufModel(file.path))


def test_info_lists_types(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", MIXED, "Q4_K")
    types = describe(file.path)["types"]
    assert {name: kind["tensors"] for name, kind in types.items()} == {
        "Q8_0": 1,
        "F32": 5,
        "Q4_K": 10,
        "Q6_K": 4,
    }
    assert types["Q8_0"]["bytes"] == 96 * 256 // 32 * 34


# A file of a model and its largest tensor are known; twice the tensor is read and put in order.
LOADING = """
import sys
from gptc.checkpoint.facade import load_model
from gptc.files.memory import peak_resident_bytes
from gptc.formats.gguf import GgufModel
small, large = (GgufModel(__import__("pathlib").Path(path)) for path in sys.argv[1:])
load_model(small).close()
before = peak_resident_bytes()
with load_model(large, max_batch=0):
    print(peak_resident_bytes() - before)
"""


def test_loading_takes_little_more_than_the_file(tmp_path: Path) -> None:
    """At most a tenth more than the file, for panels, twice its largest tensor, and 8 MB."""
    small = write_gguf(tmp_path / "small.gguf", {}, "Q4_K")
    wide = make_config("llama", n_embd=1024, n_ff=4096, vocab_size=96, n_layer=4, tied=True)
    large = write_gguf(tmp_path / "large.gguf", MIXED, "Q4_K", config=wide)
    n_bytes = large.path.stat().st_size
    most = max(entry.end - entry.offset for entry in large.tensors.entries.values())
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(small.path), str(large.path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert n_bytes > 30e6
    assert int(done.stdout) < 1.1 * n_bytes + 2 * most + 8e6
