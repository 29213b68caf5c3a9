"""The soak in little: all of its faults a few times over."""

from __future__ import annotations

import pathlib

from engine_process import IS_FULL
from soak import soak


def test_nothing_is_lost_twice_or_wrong_while_everything_dies(tmp_path: pathlib.Path) -> None:
    seconds = 300.0 if IS_FULL else 6.0
    counts = soak(tmp_path, seconds, {"kill": 2.5, "update": 1.0, "trainer": 2.0})
    print(counts.table())
    assert counts.is_clean(), counts.table()
    assert counts.worker_kills >= 2 and counts.trainer_kills >= 2 and counts.updates >= 3
    assert counts.accepted > 500
    assert counts.replacements >= counts.worker_kills - 1
