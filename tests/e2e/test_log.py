"""What a server logs: one line an event, its rank in each, no prompt, as text and as JSON."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import re
import signal
from typing import Any

import pytest
import rollpack
from engine_process import Job, run, write_config

_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (debug|info|warn|error) rank=(\d+) \S.*")
# Token ids that no number of the server's own looks like.
PROMPT = [291, 287, 283, 281]


def _config(model: pathlib.Path, tmp_path: pathlib.Path, **log: str) -> pathlib.Path:
    return write_config(
        tmp_path / "config.yaml",
        {"model": {"path": model}, "rollout": {"n": 2, "response_length": 8},
         "engine": {"kv_cache_memory": "16MiB", "num_threads": 1},
         "bridge": {"slots": 1, "slot_bytes": "1MiB", "socket": tmp_path / "s" / "rollpack.sock"}},
        {"log": log} if log else {})


def _serve(config: pathlib.Path, tmp_path: pathlib.Path) -> str:
    """Serves one prompt on two ranks, of which one is lost and replaced. Returns: the log."""
    with Job(["serve", "--config", config], num_ranks=2, recovers=True) as job:
        with rollpack.connect(tmp_path / "s" / "rollpack.sock", timeout_s=60) as client:
            client.generate([{"prompt_id": "secret", "input_ids": PROMPT}])
            os.kill(job.rank_pids()[1], signal.SIGKILL)
            job.wait_until(lambda: "has joined under" in job.stderr)
            with pytest.raises(rollpack.InvalidArgument):
                client.submit([{"prompt_id": "secret", "input_ids": [*PROMPT, 10**6]}])
            client.shutdown()
        assert job.wait(timeout_s=20) == 0
        return job.stderr


def _events(log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("variables", [{}, {"ROLLPACK_LOG_FORMAT": "json",
                                            "ROLLPACK_LOG_LEVEL": "debug"}])
def test_json_is_one_object_a_line_with_time_level_rank_and_message(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # The variables win.
    log = _serve(_config(tiny_model, tmp_path,
                         **({"format": "text"} if variables else {"format": "json",
                                                                  "level": "debug"})), tmp_path)
    events = _events(log)
    # The rest is mpirun's word on the rank that was killed.
    assert not [line for line in log.splitlines() if _LINE.fullmatch(line) or "rollpack:" in line]
    assert all(list(event)[:4] == ["time", "level", "rank", "message"] for event in events)
    for event in events:
        said = datetime.datetime.fromisoformat(event["time"].replace("Z", "+00:00"))
        assert abs(said - datetime.datetime.now(datetime.timezone.utc)).total_seconds() < 600
        assert (event["rank"] in (0, 1, 2)) and "\n" not in event["message"]
    configurations = [event["configuration"] for event in events if "configuration" in event]
    assert len(configurations) == 1
    assert configurations[0]["rollout"]["response_length"] == 8
    assert {event["level"] for event in events} >= {"debug", "info", "warn", "error"}
    joined = [event for event in events if "has joined under" in event["message"]]
    assert [(event["level"], event["rank"]) for event in joined] == [("info", 0)]
    for event in events:
        del event["time"]
    for secret in ("secret", *map(str, PROMPT)):
        assert not re.search(rf"\b{secret}\b", json.dumps(events)), secret


def test_text_has_one_line_an_event(tiny_model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    log = _serve(_config(tiny_model, tmp_path), tmp_path)
    events = [line for line in log.splitlines() if " rank=" in line]
    assert all(_LINE.fullmatch(line) for line in events)
    assert any(" info rank=0 serving at " in line for line in events)
    assert any(" error rank=0 rank 1" in line for line in events)
    assert not any(" debug " in line for line in events)
    assert "model:" in log.splitlines()  # the resolved configuration, as YAML
    assert "secret" not in log


def test_off_is_silent_but_for_why_it_failed(tiny_model: pathlib.Path,
                                             tmp_path: pathlib.Path) -> None:
    config = _config(tiny_model, tmp_path, level="off")
    with Job(["serve", "--config", config]) as job:
        with rollpack.connect(tmp_path / "s" / "rollpack.sock", timeout_s=60) as client:
            client.shutdown()
        assert job.wait(timeout_s=20) == 0
        assert job.stderr == ""
    failed = run("serve", "--config", config, "--set", "model.path=nowhere")
    assert failed.status != 0
    assert failed.stderr.startswith("rollpack: not_found: ") and failed.stderr.count("\n") == 1
    failed = run("serve", "--config", config, "--set", "model.path=nowhere",
                 "--set", "log.format=json")
    (event,) = _events(failed.stderr)
    assert event["level"] == "error" and event["message"].startswith("not_found: ")


def test_a_variable_that_is_no_format_is_named(tiny_model: pathlib.Path, tmp_path: pathlib.Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLPACK_LOG_FORMAT", "xml")
    failed = run("serve", "--config", _config(tiny_model, tmp_path))
    assert failed.status == 2
    assert "ROLLPACK_LOG_FORMAT = xml (environment): expected one of text, json" in failed.stderr
