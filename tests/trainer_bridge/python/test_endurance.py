"""Hand-overs, clients and waits in numbers: every byte right, descriptors and memory flat.

With ROLLPACK_FULL=1 a million hand-overs and ten thousand killed clients; minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import rollpack
from rollpack import aio

from real_server import RealServer, Start, logprobs, response

IS_FULL = os.environ.get("ROLLPACK_FULL", "0") == "1"


def resident_bytes(server: RealServer) -> int:
    pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def num_fds(server: RealServer) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def wait_for(client: rollpack.Client, holds: Callable[[dict[str, float]], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds(stats := client.stats()):
        assert time.monotonic() < deadline, stats
        time.sleep(0.01)


def wait_for_one_client(client: rollpack.Client) -> None:
    wait_for(client, lambda stats: stats["num_clients"] == 1)


def test_hand_overs_keep_every_byte(start: Start) -> None:
    """Client.next_batch checks the CRC of every batch; here each sample's numbers are too."""
    num_hand_overs, num_prompts = (1_000_000 if IS_FULL else 20_000), 1000
    server = start("--slots", "4", "--slot-bytes", "16384")
    expected_logprobs = logprobs()
    with rollpack.connect(server.path) as client:
        warm_bytes = fds = 0
        for number in range(num_hand_overs):
            if number % num_prompts == 0:
                base = number // num_prompts % 60
                client.submit([[1 + base, 1 + p % 60] for p in range(num_prompts)], n=1)
            with client.next_batch(1, timeout_s=20) as batch:
                assert batch.batch_seq == number + 1
                prompt = [1 + base, 1 + int(batch["prompt_index"][0]) % 60]
                assert batch["input_ids"].tolist() == prompt + response(prompt, 0)
                assert batch["rollout_log_probs"][2:].tolist() == expected_logprobs
            if number == num_hand_overs // 4:
                warm_bytes, fds = resident_bytes(server), num_fds(server)
        stats = client.stats()
        assert stats["num_batches_delivered"] == num_hand_overs
        assert stats["num_samples_held"] == stats["num_slots_in_use"] == 0
        assert num_fds(server) == fds
        assert resident_bytes(server) < warm_bytes + (4 << 20)


def die_with_a_batch(path: str, says_hello: bool) -> None:
    """In a child: takes a batch, or only knocks, and is killed. Never returns."""
    with contextlib.suppress(BaseException):
        if says_hello:
            client = rollpack.connect(path)
            client.next_batch(1, timeout_s=10)
        else:
            knocking = socket.socket(socket.AF_UNIX)
            knocking.connect(path)
            knocking.send(b"\x40\x00")  # and not even a whole length
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_clients_leave_neither_descriptors_nor_memory(start: Start) -> None:
    num_cycles, num_groups = (10_000 if IS_FULL else 300), 8
    server = start("--slots", "2", "--slot-bytes", "65536")
    with rollpack.connect(server.path) as client:
        client.submit([[1, 1 + p] for p in range(num_groups)], n=2)
        warm_bytes = fds = 0
        for cycle in range(num_cycles):
            if (pid := os.fork()) == 0:
                die_with_a_batch(server.path, says_hello=cycle % 4 != 0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            if cycle == num_cycles // 4:
                wait_for_one_client(client)
                warm_bytes, fds = resident_bytes(server), num_fds(server)
        wait_for_one_client(client)
        assert num_fds(server) == fds
        assert resident_bytes(server) < 1.01 * warm_bytes + (1 << 20)
        stats = client.stats()
        assert stats["num_batches_redelivered"] >= num_cycles // 2
        assert stats["num_slots_in_use"] == stats["num_batches_left_behind"] <= 1
        assert stats["num_waiting_calls"] == 0
        seen = []
        while len(seen) < num_groups:
            with client.next_batch(timeout_s=20) as batch:
                for sample in batch.samples():
                    prompt = [1, 1 + sample.prompt_index]
                    assert sample.prompt_ids.tolist() == prompt
                    assert sample.response_ids.tolist() == response(prompt, sample.sample_index)
                del sample  # its arrays keep the slot
                seen += batch["prompt_index"].tolist()[::2]
        assert sorted(seen) == list(range(num_groups)), "each group once, after all that"
        assert client.stats()["num_slots_in_use"] == 0


def test_a_trainer_that_stands_still_costs_no_memory(start: Start) -> None:
    """Others go on submitting; what nobody takes is bounded, and says so."""
    server = start("--slots", "2", "--slot-bytes", "65536", "--max-held-samples", "2000")
    with rollpack.connect(server.path) as paused, rollpack.connect(server.path) as busy:
        busy.submit([[1]], n=1)
        held = paused.next_batch(timeout_s=20)  # the trainer stops here, with a batch in its hands
        first = held["input_ids"].copy()
        num_accepted, num_refused, full_bytes = 1, 0, 0
        end = time.monotonic() + (60 if IS_FULL else 2)
        while time.monotonic() < end:
            try:
                busy.submit([[1 + p] for p in range(50)], n=4)
                num_accepted += 200
                # What the service has yet to draw is bounded by itself, if at all.
                wait_for(busy, lambda stats, num_made=num_accepted - 1:
                         stats["num_samples_held"] >= num_made)
            except rollpack.WouldBlock as error:
                assert "take batches" in str(error)
                num_refused += 1
                full_bytes = full_bytes or resident_bytes(server)
        assert num_refused > 20, "it has been full for long"
        assert num_accepted <= 2000 + 200 + 1
        assert resident_bytes(server) < full_bytes + (1 << 20)
        assert (held["input_ids"] == first).all()
        held.release()
        num_taken = 1
        while num_taken < num_accepted:  # and nothing was lost meanwhile
            with paused.next_batch(timeout_s=20) as batch:
                num_taken += batch.num_samples
        assert num_taken == num_accepted
        with pytest.raises(rollpack.DeadlineExceeded):
            paused.next_batch(timeout_s=0.1)


def test_a_thousand_clients_at_once_get_a_group_each(start: Start) -> None:
    num_clients = 1000
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)  # the server inherits them
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(16384, limits[1]), limits[1]))
    server = start("--slots", "4", "--slot-bytes", "16384")

    async def run() -> list[int]:
        clients = await asyncio.gather(
            *(aio.connect(server.path, timeout_s=60) for _ in range(num_clients)))
        assert (await clients[0].stats())["num_clients"] == num_clients

        async def take(client: aio.AsyncClient) -> int:
            with await client.next_batch(1, timeout_s=60) as batch:
                (prompt,) = batch["prompt_index"].tolist()
                assert batch["input_ids"].tolist()[1:] == response([prompt % 60], 0)
                return prompt

        waiting = [asyncio.ensure_future(take(client)) for client in clients]
        await clients[0].submit([[p % 60] for p in range(num_clients)], n=1)
        taken = await asyncio.gather(*waiting)
        await asyncio.gather(*(client.close() for client in clients))
        return taken

    assert sorted(asyncio.run(run())) == list(range(num_clients))
    with rollpack.connect(server.path) as client:
        wait_for_one_client(client)
        assert client.stats()["num_slots_in_use"] == 0
