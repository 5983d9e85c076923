"""A run is opened at its newest whole checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from gptc.checkpoint.find import find_checkpoint, open_checkpoint
from gptc.cli.runs import describe_runs
from gptc.convert.verify import verify
from gptc.errors import GptcError, UsageError


def test_a_run_falls_back_to_its_newest_whole_checkpoint(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_checkpoint(run).name == "ckpt-000006"
    assert not caplog.records
    weights = run / "ckpt-000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert find_checkpoint(run).name == "ckpt-000003"
    assert "ckpt-000006/model.safetensors is truncated" in caplog.text
    (run / "ckpt-000003" / "checksums.json").unlink()
    with pytest.raises(GptcError, match="holds no whole checkpoint"):
        find_checkpoint(run)


def test_limits_that_are_none_are_no_fault_of_a_run(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTC_LIMITS", "bogus=3")
    for use in (find_checkpoint, verify, lambda run: describe_runs(run.parent)):
        with pytest.raises(UsageError, match=r"^GPTC_LIMITS: 'bogus' is not one of row, [^;]*$"):
            use(run)


def test_a_link_to_nothing_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gone").symlink_to("nothing")
    Path("loop").symlink_to("loop")
    Path("good").symlink_to(run)
    assert open_checkpoint("good").step == 6
    for use in (open_checkpoint, find_checkpoint):
        for name, target in (("gone", "nothing"), ("loop", "loop"), (tmp_path / "gone", "nothing")):
            with pytest.raises(GptcError, match=rf"{name} is a link to {target}, which is not"):
                use(name)


def test_finding(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_checkpoint(run / "ckpt-000003") == run / "ckpt-000003"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GptcError, match=r"there is no checkpoint under runs/; .*gptc train"):
        find_checkpoint()
    newer = tmp_path / "runs" / "b"
    shutil.copytree(run, tmp_path / "runs" / "a")
    shutil.copytree(run, newer)
    os.utime(newer / "ckpt-000006", (2e9, 2e9))
    assert find_checkpoint() == Path("runs/b/ckpt-000006")
    assert open_checkpoint().step == 6
    (tmp_path / "empty").mkdir()
    with pytest.raises(GptcError, match="holds no checkpoint"):
        find_checkpoint(tmp_path / "empty")
    with pytest.raises(GptcError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(GptcError, match="is a file"):
        find_checkpoint(run / "ckpt-000003" / "config.json")
