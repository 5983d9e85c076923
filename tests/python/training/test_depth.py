"""One number chooses a modern model and how it is trained."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gptc.cli.train import given_options
from gptc.engine.config import GPTConfig
from gptc.errors import UsageError
from gptc.training.depth import ADAMW_RATE, CHOSEN, MICRO_BATCH, RATE, TOKENS, by_depth
from gptc.training.options import LIMITS
from gptc.training.resolve import new_options
from gptc.training.run import train

Options = dict[str, Any]
Gptc = Callable[..., Any]


@pytest.fixture
def sized(options: Options) -> Options:
    """A run of one layer, whose other options follow from its depth."""
    kept = {name: options[name] for name in ("data", "out", "threads", "eval_batches")}
    return {**kept, "depth": 1, "n_embd": 32, "seq_len": 16, "steps": 3}


@pytest.mark.parametrize("depth", range(1, 49))
def test_each_depth_is_a_model_and_a_step(depth: int) -> None:
    options = new_options({"depth": depth})
    shape = {name: getattr(options, name) for name in ("n_layer", "n_head", "n_embd", "n_ff")}
    config = GPTConfig.preset("modern", vocab_size=256, block_size=options.seq_len, **shape)
    config.check()
    assert options.batch_size * options.seq_len <= MICRO_BATCH
    assert options.step_tokens == pytest.approx(1024 * depth, rel=0.15)
    numbers = sum(
        math.prod(shape)
        for name, shape, _ in config.parameters()
        if len(shape) == 2 and name.startswith("h.")
    )
    assert options.tokens == TOKENS * numbers


def test_sizes_grow_with_the_depth() -> None:
    each = [by_depth(depth, {}) for depth in (1, 2, 4, 6, 8, 12, 24)]
    for small, large in itertools.pairwise(each):
        assert small["lr"] > large["lr"]
        for name in ("n_layer", "n_embd", "n_head", "n_ff", "tokens"):
            assert small[name] <= large[name]
    assert (each[5]["n_layer"], each[5]["n_head"], each[5]["n_embd"]) == (12, 12, 768)


@pytest.mark.parametrize("name", sorted({*CHOSEN, "warmup_steps"} - {"preset"}))
def test_each_choice_can_be_given(name: str) -> None:
    value = {"schedule": "wsd", "n_head": 4, "grad_accum": 2}.get(name)
    value = value or {"lr": 1e-3, "min_lr": 1e-4, "warmup_share": 0.5, "epochs": 1.5}.get(name, 24)
    assert getattr(new_options({"depth": 3, name: value}), name) == value


def test_other_choices_follow_from_what_is_given() -> None:
    wide = new_options({"depth": 2, "n_embd": 96, "seq_len": 64})
    assert (wide.n_ff, wide.n_head, wide.step_tokens) == (256, 2, 2048)
    assert wide.tokens == TOKENS * 2 * (4 * 96**2 + 3 * 96 * 256)
    assert new_options({"depth": 2, "n_embd": 130}).n_head == 1  # two would have 65 channels
    assert new_options({"depth": 2, "warmup_steps": 7}).warmup_share is None
    assert new_options({"depth": 2, "tokens_per_step": 8192}).grad_accum == 1  # set later
    for limit in LIMITS:
        found = asdict(new_options({"depth": 2, limit: 3}))
        assert {name for name in LIMITS if found[name] is not None} == {limit}
    assert new_options({"depth": 2, "data": ("a:0.5", "b:0.5")}).epochs is None


def test_each_optimizer_has_its_learning_rate() -> None:
    assert new_options({"depth": 2}).lr == RATE / 2
    assert new_options({"depth": 2, "optimizer": "muon"}).lr == RATE / 2
    assert new_options({"depth": 2, "optimizer": "adamw"}).lr == ADAMW_RATE / 2
    assert new_options({"depth": 2, "optimizer": "adamw", "lr": 1.0}).lr == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"depth": 0}, "--depth is 0; it must be between 1 and 48"),
        ({"depth": 49}, "--depth is 49; it must be between 1 and 48"),
        ({"depth": 2, "n_layer": -1}, "--n-layer is -1; it must be 1 or more"),
        ({"depth": 2, "preset": "gpt2"}, "leave out --preset gpt2"),
        ({"depth": 2, "init_from": "x"}, "--depth cannot be given with --init-from"),
        ({"depth": 2.5}, "depth is 2.5; it must be a whole number"),
    ],
)
def test_what_contradicts_a_depth(given: Options, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        new_options(given)


def test_a_run_says_what_was_chosen_and_keeps_it(sized: Options, gptc: Gptc) -> None:
    words = [w for key, value in sized.items() for w in (f"--{key.replace('_', '-')}", str(value))]
    shown = gptc("plan", *words).out
    assert "modern of depth 1 (qwen3)" in shown
    assert "  depth   1: --n-layer 1 --n-embd 32 --n-head 2 --n-ff 128 --seq-len 16 " in shown
    ran = gptc("train", *words, "--json")
    summary = json.loads(ran.out)
    assert (summary["step"], summary["options"]["n_ff"]) == (3, 128)
    config = Path(sized["out"]) / "config.toml"
    assert new_options(given_options(config, {"depth": None})).n_embd == 32
    assert new_options(given_options(config, {"depth": 2})).n_embd == 128  # chosen again
    with pytest.raises(UsageError, match=r"--depth cannot change on --resume \(it was 1\)"):
        train({"depth": 2, "steps": 4}, resume=sized["out"])
    assert train({"depth": 1, "steps": 4}, resume=sized["out"]).step == 4


def test_a_file_without_a_depth_keeps_its_options(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("lr = 0.5\nsteps = 9\n")
    found = new_options(given_options(file, {"depth": 2}))
    assert (found.lr, found.steps, found.tokens) == (0.5, 9, None)


def test_a_file_with_a_preset_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('preset = "gpt2"\n')
    with pytest.raises(UsageError, match=r"remove preset = 'gpt2' from .*run\.toml"):
        given_options(file, {"depth": 2})
    assert given_options(file, {"depth": 2, "preset": "modern"})["preset"] == "modern"
    assert given_options(file, {"depth": None})["preset"] == "gpt2"
    file.write_text('preset = "gpt2"\ndepth = 3\n')
    with pytest.raises(UsageError, match="remove preset = 'gpt2'"):
        given_options(file, {"depth": None})
    file.write_text('preset = "modern"\n')
    assert given_options(file, {"depth": 2})["depth"] == 2


def test_the_folder_is_named_after_the_depth(
    sized: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    del sized["out"]
    assert Path(train({**sized, "steps": 1}).out).name.startswith("depth-1-")
