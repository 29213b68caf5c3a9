"""The real server's other verbs: weights, score, abort, pause; deadlines, deaths and forks."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import rollpack
import torch

from real_server import TENSOR_SHAPES, Start, logprobs
from test_connection import in_child

Cast = Callable[[np.ndarray], object]


def weights(cast: Cast = lambda array: array, prefix: str = "") -> dict[str, object]:
    """What the fake service's update must bring, seed fixed."""
    rng = np.random.default_rng(11)
    return {
        prefix + name: cast(rng.standard_normal(shape, dtype=np.float32))
        for name, shape in TENSOR_SHAPES.items()
    }


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize(
    "cast",
    [
        lambda array: array,
        lambda array: array.astype(np.float16),
        lambda array: torch.from_numpy(array).to(torch.bfloat16),
        lambda array: torch.nn.Parameter(torch.from_numpy(array)),
        lambda array: torch.from_numpy(np.asfortranarray(array)),  # not contiguous
    ],
    ids=["float32", "float16", "torch-bfloat16", "parameter", "column-major"],
)
def test_an_update_of_any_dtype_and_wrapper_becomes_current(
    start: Start, cast: Cast, prefix: str
) -> None:
    with rollpack.connect(start().path) as client:
        version = client.update_weights(weights(cast, prefix), 7, chunk_bytes=200)
        assert (version, version.weights_hash) == (7, f"{7:016x}")
        assert (version.packing_ms, version.pause_ms) == (1.5, 0.25)
        current = client.get_weight_version()
        assert (current, vars(current)) == (version, vars(version))
        client.submit([[1, 2]], n=1)
        with client.next_batch(1, timeout_s=20) as batch:
            assert set(batch["weight_versions"][batch["loss_mask"] == 1]) == {7}


def changed(**tensors: np.ndarray | None) -> dict[str, object]:
    """The whole update with some tensors replaced, added, or (None) left out."""
    update = {**weights(), **{name.replace("__", "."): value for name, value in tensors.items()}}
    return {name: value for name, value in update.items() if value is not None}


@pytest.mark.parametrize(
    ("update", "text"),
    [
        (changed(model__norm__weight=np.ones(5, "f4")), "model.norm.weight = shape [5]"),
        (changed(model__norm__weight=None), "model.norm.weight"),
        (changed(model__extra__weight=np.ones(4, "f4")), "model.extra.weight"),
        (changed(model__norm__weight=np.ones(4, "f8")), "dtype = float64: expected float32 or"),
        (changed(model__norm__lora_A__weight=np.ones(4, "f4")), "model.norm.lora_A.weight"),
    ],
    ids=["shape", "missing", "unknown", "dtype", "lora"],
)
def test_a_refused_update_names_the_tensor_and_keeps_the_old_version(
    start: Start, update: dict[str, object], text: str
) -> None:
    with rollpack.connect(start().path) as client:
        client.update_weights(weights(), 3)
        with pytest.raises(rollpack.RollpackError) as error:
            client.update_weights(update, 4)
        assert isinstance(error.value, (rollpack.InvalidArgument, rollpack.Unsupported))
        assert text in str(error.value)
        assert client.get_weight_version() == 3
        (sample,) = client.generate([[1, 2]], n=1, timeout_s=20)
        assert set(sample.weight_versions.tolist()) == {3}
        assert client.update_weights(weights(), 5) == 5  # and the way is free for the next


def test_score_returns_each_sequence_in_order(start: Start) -> None:
    with rollpack.connect(start().path) as client:
        drawn = client.generate([[1, 2], [3]], n=2, timeout_s=20)
        by_sample = client.score(drawn)
        assert [scored.id for scored in by_sample] == [0, 1, 2, 3]
        for scored, sample in zip(by_sample, drawn):
            assert scored.scaled_logprobs.tolist() == sample.rollout_log_probs.tolist()
        (named,) = client.score([{"id": "a", "input_ids": [1], "response_ids": [2, 3, 4]}])
        assert (named.id, named.logprobs.tolist()) == ("a", logprobs(3))
        assert named.entropy.tolist() == [1.0] * 3
        with pytest.raises(
            rollpack.InvalidArgument, match=r"input_ids = 64 \(score sequences\[1\]\)"
        ):
            client.score(
                [
                    {"input_ids": [1], "response_ids": [2]},
                    {"input_ids": [64], "response_ids": [2]},
                ]
            )


def test_a_bad_prompt_is_named_and_nothing_is_accepted(start: Start) -> None:
    with rollpack.connect(start().path) as client:
        with pytest.raises(
            rollpack.InvalidArgument, match=r"input_ids = 64 \(submit prompts\[1\]\)"
        ):
            client.submit([[1], [64]])
        with pytest.raises(rollpack.DeadlineExceeded):
            client.next_batch(timeout_s=0.1)


def test_abort_hands_back_partial_samples_of_that_request_only(start: Start) -> None:
    with rollpack.connect(start().path) as client:
        client.pause()
        kept, dropped = client.submit([[1]], n=2), client.submit([[2]], n=3)
        assert client.abort(dropped) == 3
        with client.next_batch(1, timeout_s=20) as batch:
            assert batch["request_id"].tolist() == [dropped] * 3
            assert {sample.finish_reason for sample in batch.samples()} == {"abort"}
            assert batch["response_lens"].tolist() == [4] * 3
        client.resume()
        with client.next_batch(1, timeout_s=20) as batch:
            assert batch["request_id"].tolist() == [kept] * 2
            assert {sample.finish_reason for sample in batch.samples()} == {"length"}
        with pytest.raises(rollpack.NotFound, match="request_id = 99"):
            client.abort(99)


def test_sleep_and_wake_up_say_what_sleeps_and_what_is_held(start: Start) -> None:
    with rollpack.connect(start().path) as client:
        both = client.sleep()
        assert (both.asleep, both.needs_weights, both.held_bytes) == (
            ("weights", "kv_cache"), False, 400)
        client.submit([[1]], n=1)
        with pytest.raises(rollpack.DeadlineExceeded, match=r"the engine sleeps: wake_up\(\)"):
            client.next_batch(timeout_s=0.05)
        part = client.wake_up(tags=["weights"])
        assert (part.asleep, part.held_bytes, part.is_awake) == (("kv_cache",), 700, False)
        assert client.wake_up().is_awake
        client.next_batch(1, timeout_s=20).release()
        assert client.sleep(level=2, mode="abort").needs_weights
        state = client.wake_up(tags=["kv_cache", "weights"])
        assert (state.asleep, state.is_awake) == ((), False)
        with pytest.raises(rollpack.DeadlineExceeded, match="has dropped the weights"):
            client.next_batch(timeout_s=0.05)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda client: client.sleep(0), "level = 0: expected 1 or 2"),
        (lambda client: client.sleep(1, mode="later"), "mode = 'later': expected keep or wait or"),
        (lambda client: client.wake_up(["weigths"]), 'tags = \'weigths\': expected a list of "w'),
        (lambda client: client.wake_up([]), "tags = []: expected a list of"),
    ],
    ids=["level", "mode", "tag", "no tag"],
)
def test_sleep_and_wake_up_refuse_what_they_do_not_know(
    start: Start, call: Callable[[rollpack.Client], object], text: str
) -> None:
    with rollpack.connect(start().path) as client:
        with pytest.raises(rollpack.InvalidArgument) as error:
            call(client)
        assert text in str(error.value)


def test_nothing_is_sampled_between_pause_and_resume(start: Start) -> None:
    with rollpack.connect(start().path) as client:
        client.pause("keep")
        client.submit([[1]], n=1)
        with pytest.raises(rollpack.DeadlineExceeded):
            client.next_batch(timeout_s=0.2)
        client.resume()
        with client.next_batch(timeout_s=20) as batch:
            assert batch.num_samples == 1
        with pytest.raises(rollpack.InvalidArgument, match="mode = 'later': expected keep or wait"):
            client.pause("later")  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout_s", [0, 0.2])
def test_a_deadline_is_kept_and_the_client_goes_on(start: Start, timeout_s: float) -> None:
    with rollpack.connect(start().path) as client:
        begin = time.monotonic()
        with pytest.raises(rollpack.DeadlineExceeded):
            client.next_batch(timeout_s=timeout_s)
        assert timeout_s <= time.monotonic() - begin < timeout_s + 4
        assert client.health() == "ok"


def test_failed_samples_come_with_their_typed_error(start: Start) -> None:
    with rollpack.connect(start().path) as client:
        with pytest.raises(rollpack.SamplesFailed) as error:
            client.generate([[63, 1], [1]], n=2, timeout_s=20)
        assert [failed.prompt_index for failed in error.value.failed] == [0, 0]
        assert all(isinstance(f.error, rollpack.NonFinite) for f in error.value.failed)
        assert len(error.value.samples) == 2


def wait_for_end(client: rollpack.Client, errors: list[BaseException]) -> None:
    try:
        client.next_batch(timeout_s=60)
    except rollpack.RollpackError as error:
        errors.append(error)


def test_a_killed_server_ends_every_call_with_a_clear_error(start: Start) -> None:
    server = start()
    client = rollpack.connect(server.path)
    client.submit([[5, 6]], n=1)
    batch = client.next_batch(timeout_s=20)
    errors: list[BaseException] = []
    waiting = threading.Thread(target=wait_for_end, args=(client, errors))
    waiting.start()
    time.sleep(0.2)
    server.kill()
    waiting.join(10)
    assert [type(error) for error in errors] == [rollpack.Unavailable]
    assert server.path in str(errors[0])
    calls = (
        client.stats,
        lambda: client.submit([[1]]),
        lambda: client.update_weights(weights(), 2),
    )
    for call in calls:
        with pytest.raises(rollpack.Unavailable):
            call()
    assert batch["input_ids"][:2].tolist() == [5, 6]  # its memory outlives the server
    batch.release()
    client.close()


def test_shutdown_ends_the_server_and_later_calls_say_so(start: Start) -> None:
    server = start()
    with rollpack.connect(server.path) as client:
        client.shutdown()
        assert server.process.wait(10) == 0
        with pytest.raises(rollpack.Unavailable):
            client.health(timeout_s=5)
    with pytest.raises((rollpack.NotFound, rollpack.Unavailable)):
        rollpack.connect(server.path, timeout_s=0.1)


def test_a_forked_child_is_told_to_connect_again_and_the_parents_batch_stays(start: Start) -> None:
    server = start("--slots", "1")
    with rollpack.connect(server.path) as client:
        client.submit([[5, 6]], n=1)
        batch = client.next_batch(timeout_s=20)
        assert "the connection belongs to process" in in_child(client.stats)

        def own() -> str:
            with rollpack.connect(server.path) as mine:
                return mine.health()

        assert in_child(own) == "'ok'"
        assert in_child(batch.release) == "None"  # gives nothing back in the parent's name
        client.submit([[7]], n=1)
        with pytest.raises(rollpack.DeadlineExceeded):
            client.next_batch(timeout_s=0.1)
        assert batch["input_ids"][:2].tolist() == [5, 6]
        batch.release()
        del batch
        gc.collect()
        with client.next_batch(timeout_s=20) as following:
            assert following["input_ids"][0] == 7


@pytest.mark.parametrize(
    "name", [("PROTOCOL_VERSION", "rollpack.hello"), ("SCHEMA_VERSION", "rollpack.schema")]
)
def test_another_version_is_an_error_naming_both(
    start: Start, monkeypatch: pytest.MonkeyPatch, name: tuple[str, str]
) -> None:
    server = start()
    monkeypatch.setattr(f"{name[1]}.{name[0]}", 2)
    with pytest.raises(rollpack.Unsupported) as error:
        rollpack.connect(server.path)
    assert f"{name[0].lower()} = " in str(error.value)
    assert "1" in str(error.value) and "2" in str(error.value)


def test_many_clients_leave_no_descriptor_and_no_thread(start: Start) -> None:
    server = start()
    rollpack.connect(server.path).close()
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(20):
        with rollpack.connect(server.path) as client:
            assert client.generate([[1]], n=1, timeout_s=20)[0].prompt_ids.tolist() == [1]
    del client  # a client keeps its maps of the slots for as long as it lives
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
