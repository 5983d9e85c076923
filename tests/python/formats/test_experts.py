"""Models with experts: files that lack some, quantized ones, adapters, a training run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptc import Lora, Model
from gptc.convert.export_model import export_model
from gptc.engine import library
from gptc.engine.config import MOST_EXPERTS
from gptc.engine.lora import adapters_of
from gptc.errors import GptcError, UsageError
from gptc.formats import gguf, gguf_write, hf
from gptc.formats.model_file import ModelFile
from gptc.formats.registry import open_model
from small_models import make_checkpoint, make_config, make_model

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


def experts(**changes: Any) -> Any:
    return make_config("llama", **{"n_embd": 64, "n_ff": 32, "n_expert": 4, **changes})


@pytest.fixture
def source(tmp_path: Path) -> ModelFile:
    """Each token has all experts: rounded numbers cannot choose others."""
    return make_checkpoint(experts(n_expert_used=4), folder=tmp_path / "model")


def distance(one: Any, other: Any) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def logits(path: Path, **options: Any) -> Any:
    with Model.load(path, threads=1, max_batch=2, max_seq=12, training=False, **options) as model:
        return model.logits(TOKENS)


def test_a_preset_with_experts_is_a_mixtral() -> None:
    config = experts()
    assert (config.n_expert_used, config.expert_norm, config.router_loss) == (2, True, 0.01)
    assert hf.model_type(config) == "mixtral"
    assert hf.model_type(replace(config, qk_norm=True)) == "qwen3_moe"
    assert hf.model_type(replace(config, expert_norm=False)) == "gptc"
    assert experts(n_expert=1).n_expert_used == 1
    assert library.load().lib.GPT_MAX_EXPERTS == MOST_EXPERTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_expert_used": 5}, "n_expert_used is 5; it must be between 1 and 4"),
        ({"n_expert_used": 0}, "n_expert_used is 0; it must be between 1 and 4"),
        ({"n_expert": 129}, "n_expert is 129; it must be between 0 and 128"),
        ({"n_expert": 0, "n_expert_used": 2}, "n_expert is 0; n_expert_used, expert_norm"),
        ({"router_loss": -1.0}, "router_loss is -1; it must be 0"),
        ({"mlp_bias": True}, "experts have no biases"),
    ],
)
def test_impossible_experts_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        experts(**changes).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "lacks the tensor model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("extra", "holds model.layers.0.block_sparse_moe.experts.4.w1.weight, which its model lac"),
        ("router", r"gate.weight has the shape \(3, 64\), not \(4, 64\)"),
    ],
)
def test_a_folder_with_other_experts_is_refused(
    change: str, message: str, source: ModelFile, tmp_path: Path
) -> None:
    export_model(source, "hf", tmp_path / "out", weights_only=True)
    name = tmp_path / "out" / "model.safetensors"
    tensors, block = load_file(name), "model.layers.{}.block_sparse_moe"
    if change == "missing":
        del tensors[f"{block.format(1)}.experts.3.w2.weight"]
    elif change == "extra":
        one = tensors[f"{block.format(0)}.experts.3.w1.weight"]
        tensors[f"{block.format(0)}.experts.4.w1.weight"] = one.copy()
    else:
        gate = f"{block.format(0)}.gate.weight"
        tensors[gate] = tensors[gate][:3].copy()
    save_file(tensors, name, metadata={"format": "pt"})
    (tmp_path / "out" / "checksums.json").unlink(missing_ok=True)
    with pytest.raises(GptcError, match=message) as caught:
        logits(tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"expert_count": 5}, "ffn_gate_inp.weight has the shape"),
        ({"expert_count": 3, "expert_used_count": 2}, "ffn_gate_inp.weight has the shape"),
        ({"expert_used_count": 5}, "expert_used_count is 5, and there are 4 experts"),
        ({"expert_used_count": 0}, "expert_used_count is 0, not a whole number above 0"),
        ({"expert_count": 0}, "lacks the tensor blk.0.ffn_gate.weight"),
    ],
)
def test_a_gguf_file_with_other_experts_is_refused(
    keys: dict[str, Any],
    message: str,
    source: ModelFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metadata, named = gguf_write._metadata, {f"llama.{key}": v for key, v in keys.items()}
    with monkeypatch.context() as patch:
        patch.setattr(gguf_write, "_metadata", lambda *given: {**metadata(*given), **named})
        (tmp_path / "m.gguf").write_bytes(b"".join(gguf.model_chunks(source, None)))
    with pytest.raises(GptcError, match=message) as caught:
        logits(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


def test_quantized_experts_are_computed_as_they_are_stored(
    source: ModelFile, tmp_path: Path
) -> None:
    want = logits(source.path)
    export_model(source, "gguf", tmp_path / "m.gguf", dtype="q8_0", weights_only=True)
    packed = open_model(tmp_path / "m.gguf")
    assert len(packed.packing()) == 2 * (4 + 4 * 3) + 2
    assert dict(packed.types())["F32"][0] == 2 * 3 + 1  # norms, and the routers as in llama.cpp
    assert distance(logits(tmp_path / "m.gguf", dtype="packed"), want) < 0.07
    export_model(packed, "gguf", tmp_path / "again.gguf", dtype="packed", weights_only=True)
    again = open_model(tmp_path / "again.gguf")
    for name, _, _ in packed.config.parameters():
        assert np.array_equal(again.read(name), packed.read(name)), name


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 0.03), ("int8", 0.07), ("int4", 0.55)])
def test_other_dtypes_are_near(dtype: str, most: float, source: ModelFile) -> None:
    """A dense model of this kind is 0.017, 0.045 and 0.41 away."""
    assert 0 < distance(logits(source.path, dtype=dtype), logits(source.path)) < most


def test_only_attention_has_adapters() -> None:
    config = experts()
    assert adapters_of(config) == ("q", "k", "v", "proj")
    with make_model(config, lora=Lora(2, 2.0, adapters_of(config))) as model:
        model.backward(TOKENS, TOKENS)
    with pytest.raises(GptcError, match="experts have no adapters: choose targets of attention"):
        make_model(config, lora=Lora(2, 2.0, ("q", "gate")))


def test_the_load_balance_loss_spreads_tokens() -> None:
    """The router's gradient changes with its factor alone, and not the loss."""
    found = []
    for factor in (0.0, 5.0):
        with make_model(replace(experts(), router_loss=factor)) as model:
            loss = model.backward(TOKENS, TOKENS)
            grads = model.gradients()
            found.append((loss, grads["h.0.mlp.router.weight"], grads["lm_head.weight"]))
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][2], found[1][2])
    assert not np.allclose(found[0][1], found[1][1])
