"""`rollpack top` beside a running server: one screen, a live one, and no server at all."""

from __future__ import annotations

import os
import pathlib
import pty
import re
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
import rollpack
from engine_process import BINARY, write_config
from scrape import port_of, scrape_until

PROMPTS = [[7, 8, 9], [5, 6]]


@pytest.fixture(scope="module")
def served(tiny_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server that has sampled 2 x 3 x 10 tokens."""
    config = write_config(
        tmp_path_factory.mktemp("top") / "config.yaml",
        {"model": {"path": tiny_model}, "engine": {"kv_cache_memory": "16MiB", "num_threads": 1},
         "rollout": {"n": 3, "response_length": 10, "ignore_eos": True},
         "bridge": {"slots": 1, "slot_bytes": "1MiB"}, "metrics": {"port": 0}})
    with rollpack.launch(config) as client:
        client.generate(PROMPTS)
        port = port_of(client)
        scrape_until(port, lambda m: m["generation_tokens_total"] == 60
                     and m["num_requests_running"] == 0 and m["batches_delivered_total"] > 0)
        yield port


def _top(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BINARY, "top", *map(str, arguments)], capture_output=True, text=True,
                          timeout=30)


def test_once_prints_what_the_metrics_say(served: int, tmp_path: pathlib.Path,
                                          tiny_model: pathlib.Path) -> None:
    done = _top("--once", "--port", served)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"rollpack top  127.0.0.1:{served}  {tiny_model}  bfloat16  ")
    assert lines[0].endswith("  ok")
    assert "60 sampled in all" in done.stdout and "6 length" in done.stdout
    assert re.search(r"^ +0 +0 +0% +60 +- +0\.0 s$", done.stdout, re.MULTILINE)
    assert "\x1b" not in done.stdout
    # The port of the job's own configuration.
    config = write_config(tmp_path / "c.yaml", {"model": {"path": tiny_model},
                                                "metrics": {"port": served}})
    assert "60 sampled in all" in _top("--once", "--config", config).stdout


def test_a_terminal_gets_one_screen_over_the_other(served: int) -> None:
    mine, theirs = pty.openpty()
    process = subprocess.Popen([BINARY, "top", "--port", str(served), "--interval", "0.1"],
                               stdout=theirs, stderr=subprocess.DEVNULL, start_new_session=True)
    os.close(theirs)
    seen = b""
    deadline = time.monotonic() + 20
    while seen.count(b"\x1b[H") < 3 and time.monotonic() < deadline:
        seen += os.read(mine, 65536)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT
    os.close(mine)
    assert seen.count(b"\x1b[2J") == 1 and seen.count(b"60 sampled in all") >= 2


@pytest.mark.parametrize(("arguments", "status", "said"), [
    (["--once", "--port", 1], 1, "unavailable: port = 1: expected the metrics.port of a serving"),
    (["--once"], 2, "--port: expected --port or --config with metrics.port"),
    (["--once", "--port", 0], 2, "--port"),
    (["--port", 9400, "--interval", 0], 2, "--interval")])
def test_what_cannot_be_shown_is_said(arguments: list[object], status: int, said: str) -> None:
    done = _top(*arguments)
    assert done.returncode == status
    assert said in done.stderr + done.stdout


def test_off_in_the_configuration_names_the_way_out(tiny_model: pathlib.Path,
                                                    tmp_path: pathlib.Path) -> None:
    config = write_config(tmp_path / "c.yaml", {"model": {"path": tiny_model}})
    done = _top("--once", "--config", config)
    assert done.returncode == 2
    assert "metrics.port = -1 (default): expected a port above 0; its log names" in done.stderr
