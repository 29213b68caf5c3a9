"""Jobs that are killed whole, or lose rank 0, and go on from their journal: the same samples, once.

A trainer here keeps what it consumed together with `client.state_dict()`, as one does in a
checkpoint, and goes on from that after every kill.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import rollpack
from engine_process import IS_FULL, Job, write_config
from recovery_rig import MODEL, Samples
from safetensors.torch import load_file

NUM_SAMPLES, RESPONSE_LENGTH = 4, 80
NUM_KILLS = int(os.environ.get("ROLLPACK_KILLS", "100" if IS_FULL else "3"))  # of each kind
PROMPTS_A_SUBMIT = 6


def _prompts(request: int) -> list[dict[str, Any]]:
    return [{"prompt_id": f"p{request}-{index}", "input_ids": [7 + index, 50, 3 * request % 300]}
            for index in range(PROMPTS_A_SUBMIT)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The model of all servers here."""
    return MODEL.write(tmp_path_factory.mktemp("models") / "small")


class Server:
    """A job that can be killed and started again with the same journal."""

    def __init__(self, folder: pathlib.Path, tmp_path: pathlib.Path, num_ranks: int = 2) -> None:
        self.socket = tmp_path / "s" / "rollpack.sock"
        self.journal = tmp_path / "journal"
        self._num_ranks = num_ranks
        self.config = write_config(tmp_path / "config.yaml", {
            "model": {"path": folder},
            "rollout": {"n": NUM_SAMPLES, "response_length": RESPONSE_LENGTH, "ignore_eos": True,
                        "prompt_overflow": "skip"},
            "engine": {"kv_cache_memory": "64MiB", "num_threads": 1, "max_num_seqs": 32},
            "bridge": {"slots": 2, "slot_bytes": "16MiB", "socket": self.socket},
            "cluster": {"journal": self.journal}})
        self.job: Job | None = None

    def start(self) -> Job:
        self.socket.unlink(missing_ok=True)
        self.job = Job(["serve", "--config", self.config], num_ranks=self._num_ranks,
                       recovers=self._num_ranks > 0)
        self.job.wait_until(self.socket.exists)
        return self.job

    def connect(self, state: dict[str, Any] | None = None) -> rollpack.Client:
        return rollpack.connect(self.socket, resume=state)

    def stop(self) -> None:
        if self.job is not None:
            self.job.__exit__()
            assert self.job.wait_for_no_process() == []
            self.job = None


@pytest.fixture
def server(folder: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Server]:
    """Not started yet."""
    server = Server(folder, tmp_path)
    yield server
    server.stop()


@dataclass
class Trainer:
    """What a trainer has in its checkpoint."""

    samples: Samples = field(default_factory=dict)
    state: dict[str, Any] | None = None
    num_submitted: int = 0

    def consume(self, client: rollpack.Client, batch: rollpack.Batch) -> None:
        """Trains on a batch, saves, and only then gives it back."""
        assert not batch.failed
        for sample in batch.samples():
            key = (str(sample.prompt_id), sample.sample_index)
            assert key not in self.samples, f"{key} came twice"
            self.samples[key] = (sample.response_ids.tobytes(), sample.rollout_log_probs.tobytes())
        self.state = client.state_dict([batch])
        batch.release()

    def live(self, client: rollpack.Client, num_requests: int, goal: int) -> None:
        """Submits and consumes until it has `goal` samples; ends with Unavailable where it dies."""
        # Whether a submit whose reply was lost was accepted is for the server to say.
        self.num_submitted = int(client.stats()["num_requests"])
        while len(self.samples) < goal:
            num_open = self.num_submitted * PROMPTS_A_SUBMIT * NUM_SAMPLES - len(self.samples)
            if self.num_submitted < num_requests and num_open < 3 * PROMPTS_A_SUBMIT * NUM_SAMPLES:
                assert client.submit(_prompts(self.num_submitted)) == self.num_submitted
                self.num_submitted += 1
                continue
            with contextlib.suppress(rollpack.DeadlineExceeded):
                self.consume(client, client.next_batch(timeout_s=60))


def _undisturbed(folder: pathlib.Path, tmp_path: pathlib.Path, num_requests: int) -> Samples:
    config = write_config(tmp_path / "alone.yaml", {
        "model": {"path": folder},
        "rollout": {"n": NUM_SAMPLES, "response_length": RESPONSE_LENGTH, "ignore_eos": True},
        "engine": {"kv_cache_memory": "64MiB", "num_threads": 1, "max_num_seqs": 32},
        "bridge": {"slots": 2, "slot_bytes": "16MiB", "socket": tmp_path / "a" / "rollpack.sock"}})
    trainer = Trainer()
    with rollpack.launch(config) as client:
        trainer.live(client, num_requests, num_requests * PROMPTS_A_SUBMIT * NUM_SAMPLES)
    return trainer.samples


@pytest.mark.parametrize("victim", ["job", "rank 0"])
def test_kills_at_random_moments_lose_nothing_and_double_nothing(
        victim: str, server: Server, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    seed = int(os.environ.get("ROLLPACK_SEED", "1"))
    dice = random.Random(f"{victim} {seed}")
    num_requests = 4 * NUM_KILLS + 4
    trainer = Trainer()
    for kill in range(NUM_KILLS + 1):
        job = server.start()
        is_last = kill == NUM_KILLS
        goal = num_requests * PROMPTS_A_SUBMIT * NUM_SAMPLES
        timer = threading.Timer(dice.uniform(0.01, 0.6), _kill, (job, victim))
        with server.connect(trainer.state) as client:
            if not is_last:
                timer.start()
                # Never done before the kill: the last requests wait for the last life.
                with pytest.raises(rollpack.Unavailable):
                    trainer.live(client, 4 * kill + 4, goal)
                if dice.random() < 0.5:  # this trainer lives on; otherwise it is its checkpoint's
                    trainer.state = client.state_dict()
            else:
                trainer.live(client, num_requests, goal)
                assert client.stats()["num_open_samples"] == 0
                with pytest.raises(rollpack.DeadlineExceeded):
                    client.next_batch(timeout_s=0)
                # Its answer comes when all before it is on disk, which may be slower than a job
                # that is stopped.
                assert client.abort() == 0
        if not is_last:
            timer.join()
        server.stop()
    assert trainer.samples == _undisturbed(folder, tmp_path, num_requests)
    # Everything is acknowledged: the next life has nothing to do.
    job = server.start()
    assert "0 open groups, 0 batches not released" in job.stderr


def _kill(job: Job, victim: str) -> None:
    if victim == "job":
        job.kill()
    elif 0 in (ranks := job.rank_pids()):
        os.kill(ranks[0], signal.SIGKILL)


def test_restored_requests_wait_for_the_weights_they_were_accepted_under(
        server: Server, folder: pathlib.Path) -> None:
    new = {name: tensor * 0.5 for name, tensor in load_file(folder / "model.safetensors").items()}
    server.start()
    trainer = Trainer()
    with server.connect() as client:
        client.update_weights(new, version=3)
        client.submit(_prompts(0))
        while len(trainer.samples) < PROMPTS_A_SUBMIT * NUM_SAMPLES:
            trainer.consume(client, client.next_batch(timeout_s=60))
        client.submit([{**prompt, "prompt_id": f"again {prompt['prompt_id']}"}
                       for prompt in _prompts(0)], sampling={"seed": 5})
        undisturbed = client.next_batch(num_groups=PROMPTS_A_SUBMIT, timeout_s=60)
        columns = {name: undisturbed[name].tobytes()
                   for name in ("input_ids", "rollout_log_probs", "weight_versions", "request_id")}
        seq = undisturbed.batch_seq
        server.job.kill()
    server.stop()
    server.start()
    with server.connect(trainer.state) as client:
        assert client.info.awaited_weight_version == 3
        assert client.get_weight_version() == 0
        client.update_weights(load_file(folder / "model.safetensors"), version=2)
        with pytest.raises(rollpack.DeadlineExceeded, match="weights of version 3"):
            client.next_batch(timeout_s=0.3)
        client.update_weights(new, version=3)
        with client.next_batch(timeout_s=60) as batch:
            assert batch.batch_seq == seq
            assert {name: batch[name].tobytes() for name in columns} == columns
        with pytest.raises(rollpack.DeadlineExceeded):
            client.next_batch(timeout_s=0)


def test_resume_goes_on_with_the_weights_there_are(server: Server, folder: pathlib.Path) -> None:
    new = {name: tensor * 0.5 for name, tensor in load_file(folder / "model.safetensors").items()}
    server.start()
    with server.connect() as client:
        client.update_weights(new, version=1)
        client.pause("abort")
        client.submit(_prompts(0))
        server.job.kill()
    server.stop()
    server.start()
    with server.connect() as client:
        client.resume()
        with client.next_batch(num_groups=PROMPTS_A_SUBMIT, timeout_s=60) as batch:
            assert set(batch["weight_versions"].tolist()) == {-1, 0}


def test_what_a_stopped_job_had_not_delivered_comes_whole_in_the_next(server: Server) -> None:
    server.start()
    with server.connect() as client:
        client.submit(_prompts(0))
        server.job.signal(signal.SIGTERM)
        server.job.wait(timeout_s=30)
    server.stop()
    server.start()
    with server.connect() as client, \
            client.next_batch(num_groups=PROMPTS_A_SUBMIT, timeout_s=60) as batch:
        assert batch.num_samples == PROMPTS_A_SUBMIT * NUM_SAMPLES
        assert set(batch["finish_reason"].tolist()) == {1}


def test_a_batch_with_partial_samples_comes_again_as_it_was(server: Server) -> None:
    names = ("input_ids", "rollout_log_probs", "finish_reason", "sample_index", "prompt_id_bytes")
    server.start()
    with server.connect() as client:
        request = client.submit(_prompts(0), n=16, sampling={"response_length": 400})
        time.sleep(0.1)
        assert client.abort(request) > 0
        batch = client.next_batch(num_groups=PROMPTS_A_SUBMIT, timeout_s=60)
        assert 2 in batch["finish_reason"].tolist()
        before = {name: batch[name].tobytes() for name in names}
        server.job.kill()
    server.stop()
    server.start()
    with server.connect() as client, client.next_batch(timeout_s=60) as batch:
        assert {name: batch[name].tobytes() for name in names} == before


def test_failures_are_told_once(server: Server) -> None:
    server.start()
    with server.connect() as client:
        client.submit([{"prompt_id": "long", "input_ids": [5] * 600}])
        batch = client.next_batch(timeout_s=60)
        assert batch.num_samples == 0
        assert {failed.error.field for failed in batch.failed} == {"input_ids"}
        state = client.state_dict([batch])
        server.job.kill()
    server.stop()
    server.start()
    with server.connect(state) as client, pytest.raises(rollpack.DeadlineExceeded):
        client.next_batch(timeout_s=0.2)


def test_two_jobs_cannot_share_a_journal(server: Server, tmp_path: pathlib.Path) -> None:
    server.start()
    with Job(["serve", "--config", server.config, "--set",
              f"bridge.socket={tmp_path / 'other' / 'rollpack.sock'}"]) as other:
        assert other.wait(timeout_s=30) != 0
        assert "cluster.journal" in other.stderr
        assert "another process has locked it" in other.stderr
