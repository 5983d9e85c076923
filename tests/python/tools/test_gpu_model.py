"""tools/gpu/model.py: costs of a step on a GPU, compared with a measurement."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[3] / "tools" / "gpu" / "model.py"
sys.path.insert(0, str(TOOL.parent))

import model as gpu  # noqa: E402

STEP = gpu.Step(gpu.PRESETS["gpt2"], 64, 1024)
CARD = gpu.CARDS["h200"]
HEAD = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'


def total(step: gpu.Step, what: str) -> float:
    return sum(getattr(launch, what) for launch in step.launches())


def test_flops_are_those_of_the_model_and_of_attention_done_again() -> None:
    c, tokens = STEP.c, STEP.N
    in_model = 3 * c.flops_per_token(STEP.T) * tokens
    again = 3 * 12 * 64 * c.C * STEP.T * STEP.T  # 9 products of attention instead of 6
    padding = 6 * (c.Vp - c.V) * c.C * tokens
    assert total(STEP, "flops") == pytest.approx(in_model + again + padding, rel=1e-3)


def test_an_update_moves_seven_floats_and_a_packed_weight() -> None:
    (update,) = [x for x in STEP.launches() if x.name == "adamw_update_kernel"]
    n_params = 124_475_904  # with the padded vocabulary
    assert update.read + update.written == pytest.approx(n_params * (7 * 4 + 2), rel=0.01)


def test_the_expectation_of_the_measured_step() -> None:
    """106.5 ms on an H200: docs/log/2026-11-26-cuda-h200.md."""
    expected = sum(x.expected_s(CARD) for x in STEP.launches())
    assert expected == pytest.approx(106.5e-3, rel=0.02)


def test_a_floor_is_never_above_its_expectation() -> None:
    for preset in gpu.PRESETS.values():
        for step in (gpu.Step(preset, 4, 256), gpu.Step(preset, 4, 1, 100)):
            for card in gpu.CARDS.values():
                assert all(x.floor_s(card) < x.expected_s(card) for x in step.launches())


def test_a_list_that_differs_is_noticed() -> None:
    names = [x.key for x in STEP.launches()]
    assert gpu.differences(names, names) is None
    assert "launch 3" in str(gpu.differences(names, names[:3] + names[4:]))
    assert "nothing" in str(gpu.differences(names, names[:-1]))


def test_a_trace_has_the_nodes_of_graphs_alone() -> None:
    trace = """limits chunk_bytes=32768 multiprocessors=2 few_norm_rows=6 max_segments=3
copy 96 to the device
graph 3
kernel rope_forward_kernel 1 1 1 256 0
product NT 24 96 32 36 bf16
memset 512
end
kernel outside_kernel 1 1 1 32 0
"""
    nodes, limits = gpu.recorded(trace)
    assert nodes == ["rope_forward_kernel", "product NT 24 96 32", "memset"]
    assert limits.few_norm_rows == 6


def ncu(step: gpu.Step, us: float) -> list[str]:
    """Rows of ncu's CSV for a step whose kernels all take so long."""
    names = {"product": "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTN"}
    return [
        f'"{i}","void {names.get(x.name, x.name + "<8, true>(op)")}","gpu__time_duration.sum","ns",'
        f'"{us * 1e3:,.0f}"\n'
        for i, x in enumerate(step.launches())
        if x.name != "memset"
    ]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, check=False
    )


SMALL = ("--preset", "byte", "--batch", 2, "--seq", 64)


def test_a_measurement_is_a_column(tmp_path: Path) -> None:
    step = gpu.Step(gpu.PRESETS["byte"], 2, 64)
    rows = ncu(step, 1500)
    split = '"9","splitKreduce_kernel","gpu__time_duration.sum","us","500"\n'
    at = next(i for i, row in enumerate(rows) if "nvjet" in row)
    file = tmp_path / "ncu.csv"
    before = '"0","void warm_up_kernel()","gpu__time_duration.sum","ns","9"\n'
    file.write_text("==PROF== Connected\n" + HEAD + before + "".join(rows[: at + 1]) + split)
    with file.open("a") as out:
        out.writelines(rows[at + 1 :])
        out.writelines(rows)  # a second step
    done = run(*SMALL, "--measured", file)
    assert done.returncode == 0, done.stderr
    (last,) = [line for line in done.stdout.splitlines() if line.startswith("| **all**")]
    assert float(last.split("|")[-2]) == pytest.approx(1.5 * len(rows) + 0.25)


def test_a_measurement_of_other_launches_is_refused(tmp_path: Path) -> None:
    rows = ncu(gpu.Step(gpu.PRESETS["byte"], 2, 64), 1)
    file = tmp_path / "ncu.csv"
    file.write_text(HEAD + "".join(rows[:5] + rows[6:]))
    assert "the model has" in run(*SMALL, "--measured", file).stderr
    file.write_text(HEAD + "".join(rows[:5]))
    assert "ends after 5 of" in run(*SMALL, "--measured", file).stderr


def test_single_figures_come_from_json(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"attention_forward_kernel": 334.0, "head, dw": 543.0}))
    lines = run("--measured", file).stdout.splitlines()
    (forward,) = [line for line in lines if line.startswith("| attention_forward_kernel")]
    assert forward.endswith("| 4.008 |")
