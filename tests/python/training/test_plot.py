"""Pictures of runs show the numbers of the runs, and a run without numbers is one clear line."""

from __future__ import annotations

import builtins
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from gptc.errors import GptcError
from gptc.training import yardstick
from gptc.training.curves import read_curves, smooth
from gptc.training.plot import _label, check_out, draw
from gptc.training.yardstick import Gain, gain_of

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")

Gptc = Callable[..., Any]


@pytest.mark.parametrize("key", ["step", "tokens", "elapsed_s", "train_loss", "val_loss", "lr"])
def test_a_number_beyond_a_float_is_a_damaged_line(tmp_path: Path, key: str) -> None:
    run = _write(tmp_path / "run", 9)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    for digits in ("9" * 19, "-" + "9" * 400):
        damaged = json.dumps({**json.loads(lines[2]), key: "?"}).replace('"?"', digits)
        (run / "metrics.jsonl").write_text("\n".join([*lines[:2], damaged, *lines[3:]]) + "\n")
        curves = read_curves(run)
        assert [record["step"] for record in curves.records] == [1, 2, *range(4, 10)]


def _write(folder: Path, n: int, *, loss: float = 4.0) -> Path:
    """A run of n steps that is evaluated at each third."""
    folder.mkdir()
    lines = []
    for step in range(1, n + 1):
        record = {"step": step, "tokens": 10 * step, "elapsed_s": 0.5 * step, "lr": 1e-3}
        record |= {"train_loss": loss / step, "grad_norm": 1.0, "tokens_per_s": 20.0}
        if step % 3 == 0:
            record |= {"val_loss": loss / step + (step > n // 2), "val_bpb": 1 / step}
            record |= {"update_ratio/mlp.fc": 1e-3 * step, "update_ratio/wte": 2e-3}
        lines.append(json.dumps(record) + "\n")
    for step in (3, 6, 9):
        sample = json.dumps({"step": step, "text": f"<script>{step}</script> & so on"})
        lines.append(sample + "\n")
    (folder / "samples.jsonl").write_text("".join(lines[-3:]) + '{"step": 9, "text": 1}\n{"st')
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": dam')
    return folder


def test_curves_are_the_records(tmp_path: Path) -> None:
    run = read_curves(_write(tmp_path / "a<b", 9))
    assert run.name == "a<b"
    for axis, factor in (("step", 1), ("tokens", 10), ("time", 0.5)):
        at, values = run.curve("train_loss", axis)
        assert at.tolist() == [factor * step for step in range(1, 10)]
        assert values.tolist() == [4.0 / step for step in range(1, 10)]
    assert run.curve("val_bpb")[0].tolist() == [3, 6, 9]
    assert run.curve("elsewhere")[0].shape == (0,)
    best = run.best()
    assert best is not None
    assert best["step"] == 3


def test_smoothing_keeps_means_and_straight_lines() -> None:
    line = np.arange(1000.0)
    assert np.allclose(smooth(line), line)
    noise = np.random.default_rng(1).normal(size=10_000)
    assert smooth(noise)[200:-200].std() == pytest.approx(1 / np.sqrt(101), rel=0.3)
    assert np.array_equal(smooth(noise[:50]), noise[:50])


@pytest.mark.usefixtures("one_panel")
@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")]
)
def test_images_are_of_the_kind_of_their_suffix(tmp_path: Path, suffix: str, magic: bytes) -> None:
    out = tmp_path / f"curves{suffix}"
    draw([read_curves(_write(tmp_path / "run", 300))], out)
    assert out.read_bytes().startswith(magic)


def test_a_page_needs_nothing_else_and_names_what_differs(tmp_path: Path) -> None:
    runs = [
        read_curves(_write(tmp_path / name, 9, loss=loss)) for name, loss in (("<a>", 4), ("b", 3))
    ]
    for run, rate in zip(runs, (0.1, 0.2), strict=True):
        options = {"lr": rate, "steps": 9}
        kind = {"device": "cpu", "cpu_level": "avx2", "threads": 2, "dtype": "fp32"}
        object.__setattr__(run, "trainer", {"options": options, **kind})
    out = tmp_path / "page.html"
    draw(runs, out, "time", {runs[0].folder: Gain(5, 1.5, 2.0)})
    page = out.read_text()
    assert "<td>25.0% below a 5-gram (1.500 and 2.000 bits per byte)</td><td></td>" in page
    assert page.count("<h3>&lt;a&gt;, step ") == 3
    assert page.count("<pre>&lt;script&gt;9&lt;/script&gt; &amp; so on</pre>") == 2  # of each run
    assert "<script" not in page
    assert "mlp.fc" in page  # in the picture
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|@import|url\((?!#)""", page)
    assert "&lt;a&gt;" in page
    assert "<a>" not in page
    assert "<td>0.1</td><td>0.2</td>" in page
    assert "<th>steps</th><td>9</td><td>9</td>" in page  # a result
    assert page.count("<th>steps</th>") == 1  # and an option in which they do not differ
    assert "<th>final validation loss</th><td>1.4444</td><td>1.3333</td>" in page
    assert "<td>1.3333</td><td>1.0000</td>" in page  # best validation losses
    ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])


@pytest.mark.usefixtures("one_panel")
def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """A formula that is not one would end matplotlib; a name that begins with _ is hidden."""
    names = ["$a^{b$", "_hidden", "a\udcff", "&amp;\x01"]
    draw([read_curves(_write(tmp_path / name, 9)) for name in names], tmp_path / "page.html")
    shown = html.escape(", ".join(names).encode("utf-8", "replace").decode())
    assert f"<h1>{shown}</h1>" in (tmp_path / "page.html").read_text()
    assert _label("_hidden") == " _hidden"


@pytest.mark.usefixtures("one_panel")
def test_the_gain_is_over_the_ngrams_of_the_runs_own_data(
    gptc: Gptc, arguments: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    assert gptc("train", *arguments).code == 0
    run = read_curves(options["out"])
    gain = gain_of(run, 2)
    counted = json.loads(gptc("ngram", "--data", options["data"], "--order", 2, "--json").out)
    assert gain.counted == counted["results"][2]["bpb"]
    assert gain.model == run.records[-1]["val_bpb"]
    page = tmp_path / "page.html"
    assert gptc("plot", options["out"], "--out", page, "--ngram", 2).code == 0
    assert f"<th>gain over counting</th><td>{gain}</td>" in page.read_text()
    run.records[-1].pop("val_bpb")
    with pytest.raises(GptcError, match="has no evaluation in bits per byte"):
        gain_of(run, 2)
    object.__setattr__(run, "records", [{"step": 1, "val_loss": 1.0, "val_bpb": 1.0}])
    run.trainer["options"]["data"] = ["a:0.5", "b:0.5"]
    with pytest.raises(GptcError, match="is of several datasets"):
        gain_of(run, 2)


@pytest.mark.usefixtures("one_panel")
def test_unasked_ngrams_are_of_the_first_tokens(
    gptc: Gptc, arguments: list[str], options: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert gptc("train", *arguments).code == 0
    monkeypatch.setattr(yardstick, "UNASKED_TOKENS", 5000)
    page = tmp_path / "page.html"
    assert gptc("plot", options["out"], "--out", page).code == 0
    gain = gain_of(read_curves(options["out"]), 5, 5000)
    assert "a 5-gram of the first 5.0K tokens (" in str(gain)
    assert f"<th>gain over counting</th><td>{gain}</td>" in page.read_text()
    tokens = ("--tokens", 5000, "--order", 5, "--json")
    counted = json.loads(gptc("ngram", "--data", options["data"], *tokens).out)
    assert gain.counted == counted["results"][5]["bpb"]
    whole = gain_of(read_curves(options["out"]), 5, 10**6)
    assert "of the first" not in str(whole)


def test_a_place_that_cannot_be_written_is_named_before_the_work(
    gptc: Gptc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _write(tmp_path / "run", 9)
    monkeypatch.setattr(yardstick, "gain_of", None)  # it would be called
    for out, why in (tmp_path / "none" / "page.html", "No such file"), (run, "is a directory"):
        ran = gptc("plot", run, "--out", out)
        assert ran.code != 0
        assert why in ran.err
    assert gptc("plot", run, "--out", tmp_path / "none" / "x.png").err.startswith(
        f"gptc: error: cannot write {tmp_path / 'none' / 'x.png'} (No such file or directory): "
        "choose another file with --out"
    )
    with pytest.raises(GptcError, match="Is a directory"):
        check_out(_folder(tmp_path / "x.png"))
    assert [path.name for path in tmp_path.iterdir() if ".partial" in path.name] == []
    check_out(tmp_path / "new.svg")
    assert not (tmp_path / "new.svg").exists()


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for lines in (None, "", "{}\n", "\x00\n"):
        if lines is not None:
            (tmp_path / "run" / "metrics.jsonl").write_text(lines)
        with pytest.raises(GptcError, match=r"run holds no metrics\.jsonl with a step in it"):
            read_curves(tmp_path / "run")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_curves(_write(tmp_path / "run", 9))
    with pytest.raises(
        GptcError, match=r"x.gif does not end with a known suffix: use .png, .svg, .pdf, .html$"
    ):
        draw([run], tmp_path / "x.gif")
    real = builtins.__import__

    def without_matplotlib(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(GptcError, match=r"pictures need matplotlib: .*install matplotlib"):
        draw([run], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.usefixtures("one_panel")
def test_the_command_draws_a_run(gptc: Gptc, arguments: list[str], options: dict[str, Any]) -> None:
    assert gptc("train", *arguments).code == 0
    ran = gptc("plot", options["out"])
    assert ran.code == 0, ran.err
    assert ran.out == f"wrote {options['out']}/curves.png\n"
    page = Path(options["out"]) / "page.html"
    assert gptc("plot", options["out"], "--out", page, "--ngram", 0).code == 0
    text = page.read_text()
    assert "cpu (" in text
    assert "<th>n_embd</th><td>32</td>" in text
    assert "<h3>run, step 8</h3>" in text
    assert "gain over counting" not in text
