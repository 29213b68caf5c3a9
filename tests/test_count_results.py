"""The last line of tests/run.sh: what counts as passed, failed and skipped."""

from __future__ import annotations

import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).with_name("count_results.py")
CTEST = """<testsuite><testcase name="a" status="run"/>
<testcase name="b" status="fail"><failure message=""/></testcase>
<testcase name="c" status="notrun"><skipped message="SKIP_REGULAR_EXPRESSION_MATCHED"/></testcase>
<testcase name="d" status="notrun"><skipped message="Unable to find executable: d"/></testcase>
<testcase name="e" status="disabled"><skipped message=""/></testcase></testsuite>"""
PYTEST = """<testsuites><testsuite><testcase name="f"/><testcase name="g"><skipped/></testcase>
<testcase name="h"><error message="in set-up"/></testcase></testsuite></testsuites>"""
GOOD = '<testsuite><testcase name="a" status="run"/></testsuite>'


def _count(folder: pathlib.Path, *broken: str) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, SCRIPT, folder, *broken], capture_output=True, text=True,
                          check=False)
    return done.returncode, done.stdout.splitlines()


def test_both_runners_are_added_up(tmp_path: pathlib.Path) -> None:
    (tmp_path / "ctest.xml").write_text(CTEST)
    (tmp_path / "pytest.xml").write_text(PYTEST)
    status, lines = _count(tmp_path, "ctest")  # it has a failed test that says why it broke
    assert (status, lines[-1]) == (1, "2 passed, 3 failed, 3 skipped")
    assert [line.split()[-1] for line in lines[:-1]] == ["b", "d", "h"]


def test_a_broken_stage_without_a_failed_test_is_a_failure(tmp_path: pathlib.Path) -> None:
    (tmp_path / "ctest.xml").write_text(GOOD)
    assert _count(tmp_path) == (0, ["1 passed, 0 failed, 0 skipped"])
    assert _count(tmp_path, "build-tsan")[0] == 1
    (tmp_path / "pytest.xml").write_text("<testsuite><testcase")
    assert _count(tmp_path)[1][-1] == "1 passed, 1 failed, 0 skipped"


def test_nothing_run_is_no_success(tmp_path: pathlib.Path) -> None:
    assert _count(tmp_path) == (1, ["0 passed, 0 failed, 0 skipped"])
