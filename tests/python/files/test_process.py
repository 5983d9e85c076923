"""The time of a process."""

from __future__ import annotations

import subprocess
import sys
import time

from gptc.files.process import age_s


def test_the_age_of_a_process() -> None:
    begin, before = time.perf_counter(), age_s()
    assert before > 0
    time.sleep(0.3)
    assert abs(age_s() - before - (time.perf_counter() - begin)) < 0.1
    code = "from gptc.files.process import age_s; print(age_s())"
    begin = time.perf_counter()
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 0 < float(ran.stdout) <= time.perf_counter() - begin + 0.05
