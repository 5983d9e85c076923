"""`gptc info` describes runs, checkpoints, datasets and shards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptc.tokenizer.marks import Marks
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_checkpoint, make_config

Gptc = Callable[..., Any]


def test_info_of_a_run_and_a_checkpoint(gptc: Gptc, arguments: list[str], tmp_path: Path) -> None:
    gptc("train", *arguments)
    found = json.loads(gptc("info", tmp_path / "run", "--json").out)
    assert found["kind"] == "run"
    assert found["checkpoints"] == ["ckpt-000004", "ckpt-000008"]
    assert found["last_metrics"]["step"] == found["last_evaluation"]["step"] == 8
    newest = found["newest"]
    assert newest["training"]["step"] == 8
    assert newest["tokenizer"] == "bytes, 256 tokens"
    assert newest["parameters"] == sum(newest["parameters_by_part"].values())
    assert newest["parameters_by_part"]["token embedding"] == 256 * 32

    checkpoint = json.loads(gptc("info", newest["path"], "--json").out)
    assert checkpoint == {"kind": "checkpoint", **newest}
    table = gptc("info", newest["path"]).out
    for part in ("LlamaForCausalLM", "2 layers, 2 heads, width 32", "step 8 of 8", "feed-forward"):
        assert part in table
    weights = gptc("info", Path(newest["path"]) / "model.safetensors").out
    assert "model.embed_tokens.weight" in weights
    assert "256 x 32" in weights


def test_info_of_a_folder_of_runs(gptc: Gptc, arguments: list[str], tmp_path: Path) -> None:
    gptc("train", *arguments)
    runs = tmp_path / "runs"
    runs.mkdir()
    (tmp_path / "run").rename(runs / "one")
    (runs / "begun").mkdir()  # no checkpoint yet
    line = {"step": 1, "tokens": 9, "elapsed_s": 0.5, "train_loss": 5.0}
    (runs / "begun" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    os.utime(runs / "begun" / "metrics.jsonl", (0, 0))
    (runs / "other").mkdir()
    found = json.loads(gptc("info", runs, "--json").out)
    assert found["kind"] == "runs"
    assert [run["run"] for run in found["runs"]] == ["one", "begun"]  # the newest first
    one, begun = found["runs"]
    run = json.loads(gptc("info", runs / "one", "--json").out)
    assert one["step"] == 8
    assert one["parameters"] == run["newest"]["parameters"]
    assert one["val_loss"] == run["last_evaluation"]["val_loss"] >= one["best_val_loss"]
    assert (begun["train_loss"], begun["val_loss"], begun["parameters"]) == (5.0, None, None)
    names, first, second = gptc("info", runs).out.splitlines()
    assert names.split()[:3] == ["run", "step", "tokens"]
    assert f"{one['val_loss']:.4f}" in first
    assert second.split()[:4] == ["begun", "1", "9", "0:00"]
    assert {len(line) for line in (names, first, second)} == {len(names)}

    weights = runs / "one" / "ckpt-000008" / "config.json"
    weights.write_text("{")  # a damaged run stops nothing
    (one, _) = json.loads(gptc("info", runs, "--json").out)["runs"]
    assert (one["step"], one["parameters"]) == (8, None)


def test_info_names_the_ends_and_the_chat_templates(gptc: Gptc, saved: Path) -> None:
    tokenizer = make_tokenizer("bytes")
    tokenizer.marks = Marks(ends=(66, 27), chat_template="x", named_templates=(("rag", "y"),))
    tokenizer.save(saved)
    (saved / "checksums.json").unlink()
    found = json.loads(gptc("info", saved, "--json").out)
    assert found["ends"] == {"B": 66, "\x1b": 27}
    assert found["chat_templates"] == ["default", "rag"]
    table = " ".join(gptc("info", saved).out.split())
    assert "ends of text B (66), \\x1b (27)" in table
    assert "chat template default, rag" in table


def test_info_names_the_types_of_numbers(gptc: Gptc, tmp_path: Path) -> None:
    make_checkpoint(make_config("llama"), folder=tmp_path / "m")
    assert (
        gptc(
            "export",
            "-m",
            tmp_path / "m",
            "--to",
            "hf",
            "--out",
            tmp_path / "hf",
            "--dtype",
            "bf16",
        ).code
        == 0
    )
    for name, width, kind in (("m", 4, "F32"), ("hf", 2, "BF16")):
        found = json.loads(gptc("info", tmp_path / name, "--json").out)
        (types,) = found["types"].items()
        n_tensors = types[1]["tensors"]
        assert types == (kind, {"tensors": n_tensors, "bytes": width * found["parameters"]})
        assert f"{kind} {n_tensors}, " in " ".join(gptc("info", tmp_path / name).out.split())


def test_info_shows_what_few_models_have(gptc: Gptc, tmp_path: Path) -> None:
    yarn = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original": 12}
    yarn |= {"rope_low_freq": 1.0, "rope_high_freq": 32.0}
    changes = {"qk_norm": True, "qkv_bias": True, "attn_proj_bias": True, "window": 7, **yarn}
    make_checkpoint(make_config("llama", **changes), folder=tmp_path / "model")
    table = gptc("info", tmp_path / "model").out
    for part in (
        "qwen3, stored as Qwen3ForCausalLM",
        "biases of queries, keys and values, attention's output, untied",
        "norms of queries and keys, window of 7 tokens, yarn rotary scaling by 4 from 12 tokens",
    ):
        assert part in table
    make_checkpoint(make_config("llama"), folder=tmp_path / "plain")
    table = gptc("info", tmp_path / "plain").out
    assert "no biases" in table
    assert "window" not in table


def test_info_shows_no_text_that_commands_the_terminal(gptc: Gptc, tmp_path: Path) -> None:
    text = "begin \x1b[2J \x9b2J \x7f \u202e \U000e0001 end é\n" * 20
    (tmp_path / "text").write_text(text)
    assert gptc("prepare", tmp_path / "text", "--out", tmp_path / "data").code == 0
    for arguments in ((), ("--json",)):
        ran = gptc("info", tmp_path / "data", *arguments)
        assert all(line.isprintable() for line in ran.out.splitlines())
        assert "end é" in ran.out
    assert json.loads(ran.out)["splits"]["train"]["sample"].startswith(text[:40])


def test_info_of_a_dataset_and_a_shard(gptc: Gptc, dataset_folder: Path) -> None:
    found = json.loads(gptc("info", dataset_folder, "--json").out)
    assert found["kind"] == "dataset"
    table = gptc("info", dataset_folder).out
    assert f"{found['splits']['train']['tokens']:,} tokens in 1 shard" in table
    shard = json.loads(gptc("info", dataset_folder / "val_000000.bin", "--json").out)
    assert shard["tokens"] == found["splits"]["val"]["tokens"]
    assert shard["largest_token"] < 128
    assert "2 bytes each" in gptc("info", dataset_folder / "val_000000.bin").out
    (dataset_folder / "notes.txt").write_text("not a shard")
    ran = gptc("info", dataset_folder / "notes.txt")
    assert ran.code == 1
    assert "is a text, not a model: train on it with" in ran.err
