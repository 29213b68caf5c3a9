"""/metrics and /health of a real server, scraped while it works, fails and ends."""

from __future__ import annotations

import http.client
import os
import pathlib
import signal
import socket
import threading
import time
from typing import Any

import numpy as np
import pytest
import rollpack
from engine_process import MODEL, Config, Job, run, write_config
from safetensors.torch import load_file
from scrape import get, health, port_of, scrape, scrape_until

NUM_SAMPLES, RESPONSE_LENGTH = 3, 12
# More than any test here waits for: steps of milliseconds, a minute in all.
MUCH = [[index % 200 + 1, index // 200 + 2] for index in range(1000)]
PROMPTS = [[7 + index, 50, *range(1, 2 + index)] for index in range(6)]
# What vLLM calls by these names means the same here.
AS_VLLM = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
           "prompt_tokens_total", "generation_tokens_total", "request_success_total",
           "num_preemptions_total", "prefix_cache_queries_total", "prefix_cache_hits_total",
           "spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total",
           "spec_decode_num_accepted_tokens_total", "engine_sleep_state"}


def _config(model: pathlib.Path, tmp_path: pathlib.Path, **sections: Any) -> pathlib.Path:
    base: Config = {
        "model": {"path": model},
        "rollout": {"n": NUM_SAMPLES, "response_length": RESPONSE_LENGTH, "ignore_eos": True},
        "engine": {"kv_cache_memory": "16MiB", "num_threads": 1, "max_num_seqs": 8},
        "bridge": {"slots": 2, "slot_bytes": "1MiB", "socket": tmp_path / "s" / "rollpack.sock"},
        "metrics": {"port": 0}}
    return write_config(tmp_path / "config.yaml", base, sections)


def test_the_numbers_are_those_of_the_samples(tiny_model: pathlib.Path,
                                              tmp_path: pathlib.Path) -> None:
    with rollpack.launch(_config(tiny_model, tmp_path), num_ranks=2) as client:
        port = port_of(client)
        assert health(port) == (200, {"status": "ok", "num_workers": 2, "num_open_samples": 0,
                                      "weight_version": 0})
        assert scrape(port)["generation_tokens_total"] == 0
        client.submit(PROMPTS)
        first = client.next_batch(4)
        held = scrape_until(port, lambda metrics: metrics["slots_used"] == 1)
        assert (held["slots"], held["slot_usage_perc"], held["clients"]) == (2, 0.5, 1)
        second = client.next_batch(2)
        samples = [*first.samples(copy=True), *second.samples(copy=True)]
        lengths = [(len(s.prompt_ids), len(s.response_ids)) for s in samples]
        assert len(samples) == len(PROMPTS) * NUM_SAMPLES
        padded = sum(batch.num_samples * (int(batch["prompt_lens"].max())
                                          + int(batch["response_lens"].max()))
                     for batch in (first, second))
        first.release()
        second.release()
        weights = load_file(tiny_model / "model.safetensors")
        client.update_weights(weights, 5)
        diff = rollpack.metrics.rollout_probs_diff(np.log([0.5, 0.5]), np.log([0.5, 0.25]), [1, 1])
        client.report_probs_diff(diff)
        with pytest.raises(rollpack.DeadlineExceeded):
            client.next_batch(timeout_s=0)

        num_generated = sum(response for _, response in lengths)
        now = scrape_until(port, lambda metrics: metrics["slots_used"] == 0
                           and metrics["generation_tokens_total"] == num_generated
                           and metrics["num_requests_running"] == 0
                           and metrics["probs_diff_reports_total"] == 1
                           and metrics["weight_version"] == 5)
        assert now["prompt_tokens_total"] == sum(prompt for prompt, _ in lengths)
        assert now.labelled("request_success_total", "finished_reason") == {
            "stop": 0, "length": len(samples), "abort": 0}
        assert (now["num_requests_waiting"], now["num_requests_preempted"]) == (0, 0)
        assert (now["num_requests_open"], now["samples_held"]) == (0, 0)
        assert now["kv_pages_used"] == 0 and now["kv_pages"] > 0
        assert now["batches_delivered_total"] == 2 and now["batches_redelivered_total"] == 0
        assert now["samples_delivered_total"] == len(samples)
        num_tokens = sum(map(sum, lengths))
        assert now["batch_tokens_total"] == num_tokens
        assert now["batch_padding_tokens_total"] == 0
        assert now["batch_padding_avoided_tokens_total"] == padded - num_tokens > 0
        assert now["batch_calls_expired_total"] == 1
        assert now["batch_wait_seconds_count"] == 2
        assert 0 < now["batch_wait_seconds_sum"] < 60
        buckets = now.labelled("batch_wait_seconds_bucket", "le")
        assert list(buckets.values()) == sorted(buckets.values()) and buckets["+Inf"] == 2
        assert (now["weight_updates_total"], now["batch_version_lag"]) == (1, 0)
        assert now["rollout_probs_diff_mean"] == diff["training/rollout_probs_diff_mean"]
        assert now["rollout_probs_diff_max"] == diff["training/rollout_probs_diff_max"]
        assert now["rollout_k3_kl"] == diff["rollout_corr/k3_kl"]
        assert (now["worker_deaths_total"], now["retries_total"], now["num_workers"]) == (0, 0, 2)
        of_ranks = now.labelled("rank_generation_tokens_total", "rank")
        assert list(of_ranks) == ["0", "1"] and sum(of_ranks.values()) == num_generated
        assert now.labelled("info", "model_name") == {str(tiny_model): 1}
        assert AS_VLLM <= now.names
        assert all(kind == "counter" for name, kind in now.types.items() if name.endswith("_total"))


def test_a_lost_rank_and_what_was_tried_again_are_counted(small_model: pathlib.Path,
                                                          tmp_path: pathlib.Path) -> None:
    config = _config(small_model, tmp_path, rollout={"response_length": 100})
    with Job(["serve", "--config", config], num_ranks=2, recovers=True) as job:
        client = rollpack.connect(tmp_path / "s" / "rollpack.sock", timeout_s=60)
        port = port_of(client)
        client.submit(MUCH)
        scrape_until(port, lambda metrics: metrics.labelled("rank_engine_steps_total", "rank")
                     .get("1", 0) > 0)
        os.kill(job.rank_pids()[1], signal.SIGKILL)
        lost = scrape_until(port, lambda metrics: metrics["worker_deaths_total"] == 1)
        assert lost["retries_total"] > 0
        back = scrape_until(port, lambda metrics: metrics["num_workers"] == 2
                            and metrics["worker_replacements_total"] == 1, timeout_s=40)
        assert back["worker_deaths_total"] == 1 and health(port)[0] == 200
        client.abort()
        client.close()


def test_health_says_when_nothing_moves_and_when_it_does_again(tmp_path: pathlib.Path) -> None:
    # Progress is said once a second at most, and one step computes these prompts for seconds: with
    # a lease of half a second that is silence. Rank 0 kills everybody for it but itself.
    config = _config(MODEL, tmp_path, rollout={"prompt_length": 1024, "response_length": 2},
                     engine={"kv_cache_memory": "256MiB", "max_num_batched_tokens": 3072},
                     cluster={"lease_s": 0.5})
    with rollpack.launch(config) as client:
        port = port_of(client)
        client.submit([[*range(first, first + 1000)] for first in (10, 2000, 4000)])
        deadline = time.monotonic() + 20
        while health(port)[0] == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        status, said = health(port)
        assert (status, said["status"]) == (503, "stuck")
        assert "no progress for 0." in said["message"] or "no progress for 1." in said["message"]
        assert scrape(port)["healthy"] == 0
        client.next_batch(3).release()
        scrape_until(port, lambda metrics: metrics["healthy"] == 1)
        assert health(port)[1]["status"] == "ok"
        client.pause()
        scrape_until(port, lambda metrics: metrics["paused"] == 1)
        assert health(port)[1]["status"] == "paused"


def _silent_connections(port: int, num: int) -> list[socket.socket]:
    """Connections that begin a request and never end it, as a scraper that hangs."""
    sockets = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(num)]
    for half in sockets[::2]:
        half.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")
    return sockets


def test_peers_that_hang_cost_a_bounded_time_and_hold_up_neither_work_nor_exit(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with Job(["serve", "--config", _config(tiny_model, tmp_path)]) as job:
        with rollpack.connect(tmp_path / "s" / "rollpack.sock", timeout_s=60) as client:
            port = port_of(client)
            silent = _silent_connections(port, 40)
            started = time.monotonic()
            assert len(client.generate(PROMPTS, timeout_s=30)) == len(PROMPTS) * NUM_SAMPLES
            del silent  # closed: who waits behind them is answered
            assert health(port)[0] == 200
            assert time.monotonic() - started < 30
            silent = _silent_connections(port, 40)
            job.signal(signal.SIGTERM)
            job.wait(timeout_s=3)
        del silent


def test_a_job_that_ends_says_draining(small_model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    # A step of a stopped rank cannot end, so the end takes its 600 ms.
    config = _config(small_model, tmp_path, rollout={"response_length": 100})
    with Job(["serve", "--config", config], num_ranks=2) as job:
        with rollpack.connect(tmp_path / "s" / "rollpack.sock", timeout_s=60) as client:
            port = port_of(client)
            client.submit(MUCH)
            seen: list[tuple[int, str]] = []

            def watch() -> None:
                try:
                    while True:
                        status, said = health(port)
                        if not seen or seen[-1] != (status, said["status"]):
                            seen.append((status, said["status"]))
                except (OSError, http.client.HTTPException):
                    return  # the end

            os.kill(job.rank_pids()[1], signal.SIGSTOP)
            watching = threading.Thread(target=watch)
            watching.start()
            job.wait_until(lambda: bool(seen))
            client.shutdown()
            watching.join(20)
            assert not watching.is_alive()
        assert seen == [(200, "ok"), (503, "draining")]


def test_a_port_that_is_taken_is_named_before_anybody_waits(tiny_model: pathlib.Path,
                                                            tmp_path: pathlib.Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        config = _config(tiny_model, tmp_path, metrics={"port": port})
        job = run("serve", "--config", config, timeout_s=30)
    assert job.status == 1
    assert f"metrics.port = {port}: expected a port of 127.0.0.1 that is free" in job.stderr
    assert "Address already in use" in job.stderr


def _addresses_of(port: int) -> set[str]:
    """The addresses of this machine at which somebody listens at `port`."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in pathlib.Path("/proc/net", table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, hexadecimal = local.split(":")
            if state == "0A" and int(hexadecimal, 16) == port:
                found.add(socket.inet_ntoa(bytes.fromhex(address)[::-1])
                          if table == "tcp" else address)
    return found


def test_only_what_is_there_can_be_asked_for(tiny_model: pathlib.Path,
                                             tmp_path: pathlib.Path) -> None:
    with rollpack.launch(_config(tiny_model, tmp_path)) as client:
        port = port_of(client)
        assert get(port, "/metrics?name=x")[0] == 200
        assert get(port, "/metrics/x")[0] == 404
        assert get(port, "/health", "POST")[0] == 405
        assert get(port, "/metrics", "HEAD") == (200, "")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            raw.sendall(b"GET /" + b"x" * 20000 + b" HTTP/1.1\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 400 ")
        assert _addresses_of(port) == {"127.0.0.1"}
    # Off unless asked for.
    with rollpack.launch(_config(tiny_model, tmp_path, metrics={"port": -1})) as client:
        assert "metrics_port" not in client.stats()
