"""Adapters at inference: a model switches between several, and a merged model computes the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gptc import Lora, Model
from gptc.checkpoint.adapter import AdapterCheckpoint
from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint, open_folder
from gptc.checkpoint.merged import AdapterSet, merged, open_adapters
from gptc.cli import main
from gptc.convert.export_model import export_model
from gptc.errors import GptcError, UsageError
from gptc.formats import gguf_lora, hf
from small_models import SHAPES, batch, make_adapter, make_checkpoint, make_config


@pytest.fixture(params=sorted(SHAPES))
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base of each family."""
    return make_checkpoint(make_config(request.param), folder=tmp_path / "base").path


@pytest.fixture
def pair(base: Path, tmp_path: Path) -> list[Path]:
    """Two adapters of different ranks, targets and scales."""
    one = make_adapter(tmp_path / "one", base, "all", 2)
    return [one, make_adapter(tmp_path / "two", base, "qkv,mlp_proj", 5, kind="rslora")]


def run(*arguments: str) -> Any:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code or 0


def logits(path: Path) -> Any:
    with Model.load(path, dtype="fp32", threads=1) as model:
        return model.logits(batch(B=1)[0])


def test_a_model_switches_between_adapters_and_none(base: Path, pair: list[Path]) -> None:
    file = open_checkpoint(base)
    adapters = AdapterSet(file, pair)
    wanted = {None: logits(base), "one": logits(pair[0]), "two": logits(pair[1])}
    assert not np.allclose(wanted["one"], wanted["two"], atol=1e-2)
    with load_model(file, lora=adapters.lora, dtype="fp32", threads=1) as model:
        for name in ("one", "two", None, "one"):
            adapters.use(model, name)
            np.testing.assert_allclose(model.logits(batch(B=1)[0]), wanted[name], atol=2e-5)
        with pytest.raises(UsageError, match="one of one, two"):
            adapters.use(model, "three")


def test_an_adapter_is_brought_back_before_it_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As every folder that a kill took away while it was replaced."""
    base = make_checkpoint(make_config("byte"), folder=tmp_path / "base").path
    make_adapter(tmp_path / "kept", base, "all", 2)
    path = tmp_path / "one"
    with pytest.raises(UsageError, match=r"the adapter .*one does not exist: check the path"):
        open_adapters(path, open_checkpoint(base))
    monkeypatch.setattr("gptc.checkpoint.merged.restore", (tmp_path / "kept").rename)
    assert open_adapters(path, open_checkpoint(base)).lora.rank == 2


@pytest.mark.parametrize("targets", ["all", "k,up"])
def test_a_model_that_no_other_class_computes_has_adapters(tmp_path: Path, targets: str) -> None:
    """Its config.json is our own, and queries, keys and values are one matrix of its file."""
    config = make_config("llama", attn_proj_bias=True)
    assert (config.family, hf.model_type(config)) == ("llama", "gptc")
    base = make_checkpoint(config, folder=tmp_path / "base").path
    folder = make_adapter(tmp_path / "one", base, targets, 2)
    assert not np.allclose(logits(folder), logits(base), atol=1e-2)
    export_model(merged(open_checkpoint(folder)), "hf", tmp_path / "out")
    np.testing.assert_allclose(logits(tmp_path / "out"), logits(folder), atol=2e-5)


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_merged_model_is_exported_and_computes_the_same(
    base: Path, pair: list[Path], tmp_path: Path, to: str
) -> None:
    file = open_checkpoint(pair[1])
    with pytest.raises(UsageError, match="add --merge"):
        export_model(file, to, tmp_path / "out")
    if to == "gguf" and file.config.family == "byte":
        return  # which GGUF does not hold
    export_model(merged(file), to, tmp_path / "out")
    np.testing.assert_allclose(logits(tmp_path / "out"), logits(pair[1]), atol=2e-5)
    with pytest.raises(UsageError, match="no adapters to merge"):
        merged(open_checkpoint(base))


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_adapters_alone_are_exported_and_used(
    base: Path, pair: list[Path], tmp_path: Path, to: str
) -> None:
    file = open_checkpoint(base)
    out = tmp_path / "alone"
    if to == "gguf" and file.config.family == "byte":
        assert run("export", "-m", str(pair[1]), "--to", to, "--out", str(out)) == 1
        return
    assert run("export", "-m", str(pair[1]), "--to", to, "--out", str(out)) == 0
    adapters = AdapterSet(file, [out])
    with load_model(file, lora=adapters.lora, dtype="fp32", threads=1) as model:
        adapters.use(model, "alone")
        np.testing.assert_allclose(model.logits(batch(B=1)[0]), logits(pair[1]), atol=2e-5)
    back = tmp_path / "back"
    named = ["-m", str(base), "--adapter", str(out)]
    assert run("export", *named, "--to", "hf", "--out", str(back)) == 0
    assert run("export", *named, "--to", "hf", "--merge", "--out", str(tmp_path / "whole")) == 0
    np.testing.assert_allclose(logits(tmp_path / "whole"), logits(pair[1]), atol=2e-5)
    weights = "adapter_model.safetensors"
    if to == "hf":
        assert (back / weights).read_bytes() == (pair[1] / weights).read_bytes()
    else:
        with pytest.raises(GptcError, match="is an adapter, not a model: name its model"):
            open_checkpoint(out)


def test_lines_of_prompts_choose_their_adapter(
    base: Path, pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{}, {"adapter": "two"}, {"adapter": None}, {"adapter": "one"}, {"adapter": "three"}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": "abc", "seed": 4, **line}) + "\n" for line in lines)
    )
    options = ["--max-tokens", "30", "--dtype", "fp32"]
    named = [argument for path in pair for argument in ("--adapter", str(path))]
    assert run("infer", "-m", str(base), *named, "--prompts", str(prompts), *options) == 1
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "one of one, two" in answers[4]["error"]
    texts = [answer["samples"][0]["text"] for answer in answers[:4]]
    for path, text in zip([pair[0], pair[1], base, pair[0]], texts, strict=True):
        assert run("infer", "-m", str(path), "-p", "abc", "--seed", "4", "--json", *options) == 0
        assert json.loads(capsys.readouterr().out)["samples"][0]["text"] == text
    assert len(set(texts)) == 3


def damaged(folder: Path, **changes: Any) -> Path:
    """A copy of an adapter with other values in its adapter_config.json, without checksums."""
    copy = folder.with_name("damaged")
    shutil.copytree(folder, copy)
    (copy / "checksums.json").unlink()
    file = copy / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return copy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "lora_magnitude_vector has the shape None"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', with which peft changes"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights 'olora'"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens .* use another adapter"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 3}, "the adapter is of another model"),
        ({"r": "2"}, "r is '2'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": 10**400}, "lora_alpha is 10+, out of range"),
        ({"lora_alpha": 1e300}, "lora_alpha is 1e.300, out of range"),
        ({"r": 10**400}, "r is 10"),
        ({"lora_dropout": 10**30}, "lora_dropout is 10"),
    ],
)
def test_what_the_engine_does_not_compute_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    base = make_checkpoint(make_config("llama"), folder=tmp_path / "base").path
    folder = damaged(make_adapter(tmp_path / "one", base, "all", 2), **changes)
    with pytest.raises(GptcError, match=words):
        open_folder(folder)


def test_an_adapter_may_begin_with_any_numbers(tmp_path: Path) -> None:
    base = make_checkpoint(make_config("llama"), folder=tmp_path / "base").path
    folder = make_adapter(tmp_path / "one", base, "all", 2)
    for init in (True, False, "gaussian", "eva", None):
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        assert open_folder(damaged(folder, init_lora_weights=init)).lora is not None


def test_an_altered_adapter_is_found(tmp_path: Path) -> None:
    base = make_checkpoint(make_config("gpt2"), folder=tmp_path / "base").path
    folder = make_adapter(tmp_path / "one", base, "all", 2)
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    adapter = open_checkpoint(folder)
    assert isinstance(adapter, AdapterCheckpoint)
    with pytest.raises(GptcError, match="its checksum is wrong"):
        load_model(adapter)


def test_an_adapter_of_an_adapter_or_of_a_model_is_refused(tmp_path: Path) -> None:
    base = make_checkpoint(make_config("gpt2"), folder=tmp_path / "base").path
    folder = make_adapter(tmp_path / "one", base, "all", 2)
    with pytest.raises(UsageError, match="holds adapters itself"):
        AdapterSet(open_checkpoint(folder), [folder])
    with pytest.raises(UsageError, match="is a model, not an adapter"):
        AdapterSet(open_checkpoint(base), [base])
    with pytest.raises(UsageError, match="two adapters are named one"):
        AdapterSet(open_checkpoint(base), [folder, folder])


def test_a_gguf_adapter_of_a_rank_out_of_range_is_refused(tmp_path: Path) -> None:
    config = make_config("gpt2")
    shapes = {name: shape for name, shape, _ in Lora(2, 1.0, ("qkv",)).parameters(config)}

    def read(name: str) -> npt.NDArray[np.float32]:
        """Zeros of another rank than the engine would accept."""
        return np.zeros([5000 if n == 2 else n for n in shapes[name]], np.float32)

    path = tmp_path / "one.gguf"
    path.write_bytes(b"".join(gguf_lora.chunks(config, Lora(5000, 1.0, ("qkv",)), read)))
    with pytest.raises(GptcError, match="adapters of rank 5,000, out of range"):
        gguf_lora.GgufAdapter(path, config)
