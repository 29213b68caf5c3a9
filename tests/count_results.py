"""Adds up the JUnit files of ctest and pytest and prints one line: N passed, M failed, K skipped.

Usage: count_results.py FOLDER [BROKEN_STAGE ...]. A stage that broke and has no failed test in its
file (a build, a crash, a time-out) counts as one failure. Exits with 1 unless something passed and
nothing failed.
"""

import pathlib
import sys
import xml.etree.ElementTree as ElementTree


def outcome(case: ElementTree.Element) -> str:
    """Says "passed", "failed" or "skipped" of a <testcase>.

    ctest writes status="run", "fail", "disabled" or "notrun"; the last stands for a test that
    skipped itself, and also for one whose program is missing, which is a failure.
    """
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    status = case.get("status", "run")
    skipped = case.find("skipped")
    if status == "notrun":
        message = (skipped.get("message") or "") if skipped is not None else ""
        return "skipped" if message.startswith("SKIP_") else "failed"
    if status == "disabled" or skipped is not None:
        return "skipped"
    return "passed" if status == "run" else "failed"


def count(path: pathlib.Path) -> tuple[dict[str, int], list[str]]:
    """Counts one file. Returns: number by outcome, and the names of failed tests."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed = []
    for case in ElementTree.parse(path).iter("testcase"):
        result = outcome(case)
        counts[result] += 1
        if result == "failed":
            failed.append(f"{path.stem}: {case.get('classname', '')} {case.get('name', '')}")
    return counts, failed


def main() -> int:
    folder, broken = pathlib.Path(sys.argv[1]), sys.argv[2:]
    total = {"passed": 0, "failed": 0, "skipped": 0}
    failed_names = []
    for path in sorted(folder.glob("*.xml")):
        try:
            counts, names = count(path)
        except ElementTree.ParseError as error:  # its runner was killed while writing
            counts, names = {"failed": 1}, [f"{path.stem}: {error}"]
        for result, number in counts.items():
            total[result] += number
        failed_names += names
    for stage in broken:
        if not any(name.startswith(f"{stage}: ") for name in failed_names):
            total["failed"] += 1
            failed_names.append(f"{stage}: broke without a failed test")
    for name in failed_names:
        print("FAILED", name)
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 0 if total["passed"] and not total["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
