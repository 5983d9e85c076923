"""docs/reliability.md shows the results that the attacks recorded, and its commands exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tool_files import load_tool

ROOT = Path(__file__).resolve().parents[3]
ATTACKS = ROOT / "tools" / "attack"


@pytest.fixture(scope="module")
def results() -> ModuleType:
    return load_tool("attack/results")


def test_the_page_is_up_to_date(results: ModuleType) -> None:
    text = results.PAGE.read_text()
    wanted = results.page(text, results.read(), results.read_counts())
    assert wanted == text, "python tools/attack/results.py --write"


def test_a_recorded_result_changes_the_page(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FILE", tmp_path / "results.json")
    (tmp_path / "results.json").write_bytes((ATTACKS / "results.json").read_bytes())
    results.record("kills", "7 kills", "1 lost")
    text = results.PAGE.read_text()
    page = results.page(text, results.read(), results.read_counts())
    assert page != text
    assert "| 7 kills | 1 lost | `python tools/attack/kills.py" in page


@pytest.fixture
def recorded(results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module with other files, and no campaign yet."""
    monkeypatch.setattr(results, "FILE", tmp_path / "results.json")
    monkeypatch.setattr(results, "COUNTS", tmp_path / "campaign.json")
    (tmp_path / "results.json").write_bytes((ATTACKS / "results.json").read_bytes())
    (tmp_path / "campaign.json").write_text("{}")
    return results


def _campaign(folder: Path, seed: int, **inputs: int) -> Path:
    """A file of counts in which one input of each format crashed and five were refused."""
    counts = {
        name: {"seed": seed, "next": n, "inputs": n, "read": n - 6, "refused": 5, "crashes": 1}
        for name, n in inputs.items()
    }
    path = folder / "counts.json"
    path.write_text(json.dumps(counts))
    return path


def test_a_campaign_is_recorded_by_format(recorded: ModuleType, tmp_path: Path) -> None:
    recorded.record_campaign(_campaign(tmp_path, 1, x=9, a=9))
    text = recorded.PAGE.read_text()
    page = recorded.page(text, recorded.read(), recorded.read_counts())
    assert "| a | 9 | 3 | 5 | 1 |\n| x | 9 | 3 | 5 | 1 |\n" in page
    assert "| 18 inputs, 2 formats | 2 failures in 2 formats; since then 0 inputs" in page


def test_failures_stay_in_the_table_with_what_was_read_since(
    recorded: ModuleType, tmp_path: Path
) -> None:
    recorded.record_campaign(_campaign(tmp_path, 2, x=9, a=9))
    whole = {"read": 5, "refused": 2}
    (tmp_path / "counts.json").write_text(
        json.dumps({name: {"seed": 1, "inputs": 7, **whole} for name in ("x", "b")})
    )
    recorded.record_campaign(tmp_path / "counts.json")
    want = "2 failures in 2 formats; since then 7 inputs of these without one"
    assert recorded.read()["campaign"]["result"] == want
    recorded.record_campaign(_campaign(tmp_path, 3, a=9))
    want = "3 failures in 2 formats; since then 7 inputs of these without one"
    assert recorded.read()["campaign"]["result"] == want
    recorded.record_campaign(_campaign(tmp_path, 2, x=10, a=9))  # goes behind the other seeds
    want = "3 failures in 2 formats; since then 0 inputs of these without one"
    assert recorded.read()["campaign"]["result"] == want


@pytest.mark.parametrize(
    ("printed", "count", "result"),
    [
        (
            "500 kills (3 in saves, 9 elsewhere): 0 lost",
            "500 kills: 3 in saves, 9 elsewhere",
            "0 lost",
        ),
        ("x\n10,000 calls by 8 threads: 0 failures", "10,000 calls by 8 threads", "0 failures"),
        ("test_x: 7 checks, 0 failed", "7 checks", "0 failed"),
        ("7 inputs, 8 formats: 1 failure; exit 1", "7 inputs, 8 formats", "failed: 1 failure"),
    ],
)
def test_a_program_is_recorded_with_its_day_and_commit(
    recorded: ModuleType, printed: str, count: str, result: str
) -> None:
    text, _, code = printed.partition("; exit ")
    recorded.run_program("kills", f"printf '{text}\\n'; exit {code or 0}")
    row = recorded.read()["kills"]
    assert (row["count"], row["result"]) == (count, result)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d, ([0-9a-f]{7,}\+?|unknown)", row["at"])
    with pytest.raises(SystemExit, match="kills ends with code 1 and prints 'no'"):
        recorded.run_program("kills", "echo no; exit 1")


def test_campaigns_of_several_seeds_add_up(recorded: ModuleType, tmp_path: Path) -> None:
    recorded.record_campaign(_campaign(tmp_path, 1, x=9, a=9))
    recorded.record_campaign(_campaign(tmp_path, 2, x=10, b=8))
    recorded.record_campaign(_campaign(tmp_path, 2, x=20, b=8))  # the same one, later
    counts = recorded.read_counts()
    assert {name: one["inputs"] for name, one in counts.items()} == {"a": 9, "b": 8, "x": 29}
    assert recorded.read()["campaign"]["count"] == "46 inputs, 3 formats"
    with pytest.raises(SystemExit, match="fewer inputs of x than are recorded for seed 2"):
        recorded.record_campaign(_campaign(tmp_path, 2, x=19, b=8))


def test_each_command_names_files_that_exist(results: ModuleType) -> None:
    for row in results.read().values():
        for name in re.findall(r"(?:tools|tests)/[\w/.]+\.(?:py|supp)", row["command"]):
            assert (ROOT / name).is_file(), name


def test_each_fault_of_a_command_is_found() -> None:
    commands = load_tool("attack/commands")
    good = commands.Outcome(1, "note: x\ngptc: error: x is damaged\n", 1.0, 9)
    assert commands.fault(good, 9) is None
    assert commands.fault(good._replace(code=0, said="seed 1\n"), 9) is None
    for changes, why in (
        ({"code": -6}, "ends with -6"),
        ({"said": "gptc: error: unexpected KeyError: 1; please report it\n"}, "ends with 1"),
        ({"said": "gptc: error: x is damaged (unexpected end)\n"}, None),
        ({"said": ""}, "prints 0 errors"),
        ({"said": "gptc: error: x\ny\n"}, "prints 1 errors"),
        ({"cpu_s": 11.0}, "takes 11.0 s"),
        ({"n_bytes": (200 << 20) + 19}, "takes 200 MiB"),
    ):
        assert commands.fault(good._replace(**changes), 9) == why


@pytest.mark.skipif(sys.platform != "linux", reason="the attack needs Linux")
def test_a_few_kills_lose_nothing() -> None:
    command = [sys.executable, str(ATTACKS / "kills.py"), "--kills", "25"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    kinds = r"(\d+) elsewhere, (\d+) in saves, (\d+) in replacing saves, (\d+) in preparations"
    found = re.search(kinds, ran.stdout)
    assert found is not None
    assert all(int(n) > 0 for n in found.groups()[1:])
