"""Wrong options name themselves, and right ones survive their TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptc.errors import GptcError, UsageError
from gptc.settings import read_toml, to_toml
from gptc.training import run_model
from gptc.training.defaults import DEFAULTS
from gptc.training.options import TrainOptions
from gptc.training.resolve import new_options
from gptc.training.run import train
from runs import metrics, reproducible

Options = dict[str, Any]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stepz": 3}, "unknown option 'stepz'; did you mean steps"),
        ({"steps": 0}, "--steps is 0; it must be 1 or more"),
        ({"steps": "many"}, "steps is 'many'; it must be a whole number"),
        ({"lr": -1.0}, "--lr is -1.0; it must be above 0"),
        ({"grad_accum": 10**12}, "tokens; it must be at most 268,435,456"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"lr": 1e-3, "min_lr": 1e-2}, "--min-lr is 0.01; it must be at most --lr"),
        ({"dropout": 1.0}, "--dropout is 1.0; it must be at least 0 and below 1"),
        ({"label_smoothing": 1.0}, "--label-smoothing is 1.0; it must be at least 0 and below 1"),
        ({"ema": 1.0}, "--ema is 1.0; it must be at least 0 and below 1"),
        ({"decay_share": 0.0}, "--decay-share is 0.0; it must be above 0"),
        ({"schedule": "cos"}, "--schedule is 'cos'; it must be one of cosine"),
        ({"preset": "tinny"}, "unknown preset 'tinny'; did you mean tiny"),
        ({"bias": "no"}, "bias is 'no'; it must be true or false"),
        ({"n_layer": True}, "n-layer is True; it must be a whole number"),
        ({"init_from": "x", "n_layer": 3}, "--n-layer cannot be given with --init-from"),
        ({"n_head": 3, "n_embd": 32}, "n_head 3 does not divide n_embd 32"),
        ({"seq_len": 30_000}, "--seq-len"),
    ],
)
def test_senseless_options(dataset_folder: Path, given: Options, message: str) -> None:
    with pytest.raises(GptcError, match=message):
        train({"data": str(dataset_folder), **given})


def test_options_survive_toml(tmp_path: Path) -> None:
    options = TrainOptions(data='a "b" \\ ü', lr=3e-5, eps=1e-8, bias=False, threads=2)
    (tmp_path / "c.toml").write_text(to_toml(options), "utf-8")
    given = read_toml(TrainOptions, tmp_path / "c.toml")
    assert TrainOptions(**given) == options
    (tmp_path / "c.toml").write_text("batch_size = 3\nseq-len = 5\nlr = 1")
    assert read_toml(TrainOptions, tmp_path / "c.toml") == {"batch_size": 3, "seq_len": 5, "lr": 1}
    (tmp_path / "c.toml").write_text('steps = "1K"\ntokens = "1.5M"\nout = "2K"')
    assert read_toml(TrainOptions, tmp_path / "c.toml") == {
        "steps": 1000,
        "tokens": 1_500_000,
        "out": "2K",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "is not valid TOML"),
        ("step = 3", "unknown option 'step'; did you mean steps"),
        ("max_iters = 3", "unknown option 'max-iters'; did you mean steps"),
        ("steps = 1.5", "steps is 1.5; it must be a whole number"),
        ('steps = "few"', "steps: 'few' is not a whole number such as 300, 64K"),
        ("[train]\nsteps = 3", r"\[train\] is a table, and tables are not read"),
        (None, "No such file"),
    ],
)
def test_wrong_toml_names_the_file(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "c.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_toml(TrainOptions, path)
    assert str(path) in str(caught.value)


def test_the_run_writes_a_config_that_repeats_it(options: Options, tmp_path: Path) -> None:
    train(options)
    again = tmp_path / "again"
    train({**read_toml(TrainOptions, Path(options["out"]) / "config.toml"), "out": str(again)})
    assert reproducible(metrics(again)) == reproducible(metrics(options["out"]))


def test_preset_defaults_and_what_overrides_them() -> None:
    tiny = new_options({})
    assert {name: getattr(tiny, name) for name in DEFAULTS["tiny"]} == {
        **DEFAULTS["tiny"],
        "warmup_steps": None,  # set when the number of steps is known
    }
    assert new_options({"lr": 1e-4}).lr == 1e-4
    assert new_options({"preset": "gpt2-medium"}).lr == 6e-4
    assert new_options({"tokens": 1000}).steps is None
    assert new_options({"beta2": 0.9, "preset": "byte"}).beta2 == 0.9


def test_what_is_of_muon_is_refused_elsewhere() -> None:
    for name in ("muon_rows", "muon_cautious"):
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} is of Muon: add"):
            new_options({name: True})
        assert getattr(new_options({name: True, "optimizer": "muon"}), name)


@pytest.mark.parametrize("recompute", ["none", "mlp"])
def test_more_recomputed_layers_than_there_are_are_refused(
    options: Options, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_model, "Model", None)  # it would be called
    given = {**options, "recompute": recompute, "recompute_layers": 3}
    with pytest.raises(UsageError, match=r"^--recompute-layers is 3; the model has 2 layers: use"):
        train(given)
