"""What a trainer passes in: ids, sampling, sequences to score, and generate()."""

from __future__ import annotations

import numpy as np
import pytest
import rollpack
import torch

from fake_server import FakeServer, Message, encode_batch, packed_columns, refusal


def ids(data: bytes) -> list[int]:
    return np.frombuffer(data, "<i4").tolist()


def submitted(server: FakeServer) -> list[Message]:
    return server.requests[-1]["prompts"]


@pytest.fixture(autouse=True)
def accept(server: FakeServer) -> None:
    server.handlers["submit"] = lambda request, fds: {"request_id": 1}
    server.handlers["abort"] = lambda request, fds: {"num_aborted": 0}


@pytest.mark.parametrize(
    "prompts",
    [
        [[1, 2], [3, 4]],
        np.array([[1, 2], [3, 4]]),
        torch.tensor([[1, 2], [3, 4]]),
        [np.array([1, 2], np.uint16), torch.tensor([3, 4])],
        ((1, 2), (3, 4)),
        iter([[1, 2], [3, 4]]),
        [{"input_ids": [1, 2]}, {"input_ids": np.array([3, 4])}],
    ],
)
def test_prompts_may_be_lists_arrays_tensors_or_maps(
    server: FakeServer, client: rollpack.Client, prompts: object
) -> None:
    assert client.submit(prompts) == 1
    assert [ids(prompt["input_ids"]) for prompt in submitted(server)] == [[1, 2], [3, 4]]
    assert [set(prompt) for prompt in submitted(server)] == [{"input_ids"}] * 2


def test_a_prompts_own_settings_go_before_those_for_all(
    server: FakeServer, client: rollpack.Client
) -> None:
    own = {"prompt_id": 7, "input_ids": [1], "n": 2, "sampling": {"temperature": 0.5}}
    client.submit(
        [own, [2]], n=8, sampling={"temperature": 1.0, "top_k": 5, "stop_token_ids": [3, 4]}
    )
    first, second = submitted(server)
    assert (first["prompt_id"], first["n"], second["n"]) == (7, 2, 8)
    assert first["sampling"]["temperature"] == 0.5
    assert second["sampling"]["temperature"] == 1.0
    assert first["sampling"]["top_k"] == 5
    assert ids(first["sampling"]["stop_token_ids"]) == [3, 4]
    assert own == {"prompt_id": 7, "input_ids": [1], "n": 2, "sampling": {"temperature": 0.5}}


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        (
            [1, 2],
            "prompts[0].input_ids = 1: expected a one-dimensional list of integer token ids; ",
        ),
        ([[1], [2.5]], "prompts[1].input_ids = [2.5]: expected a one-dimensional list"),
        ([[[1], [2]]], "prompts[0].input_ids = [[1], [2]]: expected a one-dimensional"),
        ([[[1], [2, 3]]], "prompts[0].input_ids = [[1], [2, 3]]: expected a one-dimensional"),
        ([[True]], "prompts[0].input_ids = [True]: expected a one-dimensional"),
        (["text"], "prompts[0].input_ids = 'text': expected a one-dimensional"),
        ([{"prompt_id": 1}], "prompts[0].input_ids = None: expected a one-dimensional"),
        ([[-1]], "prompts[0].input_ids = -1: expected token ids from 0 to 2147483647"),
        ([[1, 2**31]], "prompts[0].input_ids = 2147483648: expected token ids from 0"),
        ([{"input_ids": [1], "sampling": 3}], "prompts[0].sampling = 3: expected a map"),
        ({"input_ids": [1]}, "prompts = {'input_ids': [1]}: expected a list; put it into a list"),
        ("text", "prompts = 'text': expected a list"),
    ],
)
def test_a_wrong_prompt_is_named_and_nothing_is_sent(
    server: FakeServer, client: rollpack.Client, prompts: object, text: str
) -> None:
    with pytest.raises(rollpack.InvalidArgument) as error:
        client.submit(prompts)
    assert text in str(error.value)
    assert server.verbs() == ["hello"]


def test_unknown_sampling_keys_are_left_to_the_server(
    server: FakeServer, client: rollpack.Client
) -> None:
    client.submit([{"input_ids": [1], "sampling": {"temprature": 1}}])
    assert submitted(server)[0]["sampling"] == {"temprature": 1}


def scores(request: Message, fds: list[int]) -> Message:
    """Answer with values that tell which sequence they belong to, last first."""
    results = []
    for sequence in request["sequences"]:
        size = len(sequence["response_ids"]) // 4
        values = np.full(size, -sequence["id"], "<f4").tobytes()
        results.append(
            {
                "id": sequence["id"],
                "logprobs": values,
                "scaled_logprobs": values,
                "entropy": values,
            }
        )
    return {"results": results[::-1]}


def test_scores_come_in_the_order_of_the_sequences_with_their_ids(
    server: FakeServer, client: rollpack.Client
) -> None:
    server.handlers["score"] = scores
    results = client.score(
        [
            {"id": "a", "input_ids": [1], "response_ids": [2, 3]},
            {"input_ids": [1], "response_ids": [], "temperature": 0.5},
            {"id": "a", "input_ids": [1], "response_ids": [4]},
        ]
    )
    assert [result.id for result in results] == ["a", 1, "a"]
    assert [result.logprobs.tolist() for result in results] == [[0, 0], [], [-2]]
    assert results[0].entropy.dtype == np.float32


def test_many_sequences_are_scored_in_parts_that_fit_a_frame(
    server: FakeServer, client: rollpack.Client
) -> None:
    server.handlers["score"] = scores
    response = np.zeros(300_000, np.int32)
    results = client.score([{"input_ids": [1], "response_ids": response}] * 9)
    assert server.verbs().count("score") == 3
    assert [result.logprobs[0] for result in results] == [-index for index in range(9)]


@pytest.mark.parametrize(
    ("sequence", "text"),
    [
        ([1, 2], "sequences[0] = [1, 2]: expected a map with input_ids and response_ids"),
        ({"input_ids": [1]}, "sequences[0].response_ids = None: expected a one-dimensional"),
    ],
)
def test_a_wrong_sequence_is_named(client: rollpack.Client, sequence: object, text: str) -> None:
    with pytest.raises(rollpack.InvalidArgument) as error:
        client.score([sequence])
    assert text in str(error.value)


def test_a_missing_score_is_data_loss(server: FakeServer, client: rollpack.Client) -> None:
    server.handlers["score"] = lambda request, fds: {"results": []}
    with pytest.raises(rollpack.DataLoss, match="score results = 0: expected one for each of 1"):
        client.score([{"input_ids": [1], "response_ids": [2]}])


def serve_samples(server: FakeServer, *orders: list[int], **changes: object) -> None:
    """Hand out one batch an order of prompt indices, then deadline errors."""
    batches = []
    for index, order in enumerate(orders):
        columns = packed_columns(num_samples=len(order), num_rows=1)
        columns["prompt_index"] = np.array(order, "<i4")
        columns.update(changes)
        batches.append((encode_batch(columns, batch_seq=index + 1), len(order)))

    def next_batch(request: Message, fds: list[int]) -> Message:
        if not batches:
            return refusal("deadline_exceeded", field="next_batch")
        batch, num_samples = batches.pop(0)
        return server.deliver(len(batches) % 2, batch, num_samples=num_samples)

    server.handlers["next_batch"] = next_batch


def test_generate_collects_everything_in_canonical_order(
    server: FakeServer, client: rollpack.Client
) -> None:
    serve_samples(server, [2, 0], [3, 1])
    samples = client.generate([[1], [2], [3], [4]])
    assert [sample.prompt_index for sample in samples] == [0, 1, 2, 3]
    assert all(sample.response_ids.flags.owndata for sample in samples)


def test_generate_of_nothing_asks_for_nothing(server: FakeServer, client: rollpack.Client) -> None:
    assert client.generate([]) == []
    assert server.verbs() == ["hello"]


def test_generate_orders_a_group_by_sample_index(
    server: FakeServer, client: rollpack.Client
) -> None:
    serve_samples(
        server,
        [0, 0, 0],
        group_size=np.full(3, 3, "<i4"),
        sample_index=np.array([2, 0, 1], "<i4"),
    )
    assert [sample.sample_index for sample in client.generate([[1]])] == [0, 1, 2]


def test_generate_raises_what_failed_and_keeps_the_rest(
    server: FakeServer, client: rollpack.Client
) -> None:
    failed = {
        "request_id": 1,
        "prompt_index": 1,
        "prompt_id": "b",
        "sample_index": 0,
        "group_size": 1,
        **refusal("non_finite", field="logits", value="nan"),
    }
    serve_samples(server, [0])
    deliver = server.handlers["next_batch"]
    server.handlers["next_batch"] = lambda request, fds: {
        **deliver(request, fds),
        "failed": [failed],
    }
    with pytest.raises(rollpack.SamplesFailed) as error:
        client.generate([[1], [2]])
    assert "1 of 2 samples failed; the first, sample 0 of prompt 'b': logits = nan" in str(
        error.value
    )
    assert [sample.prompt_index for sample in error.value.samples] == [0]
    assert isinstance(error.value.failed[0].error, rollpack.NonFinite)


def test_generate_gives_other_requests_samples_back(
    server: FakeServer, client: rollpack.Client
) -> None:
    serve_samples(server, [0, 1], request_id=np.array([1, 5], "<i8"))
    with pytest.raises(rollpack.FailedPrecondition, match="generate = samples of request 5: expec"):
        client.generate([[1]])
    with client.next_batch() as batch:
        assert batch.request_id.tolist() == [1, 5]


def test_generate_that_ran_out_of_time_aborts_and_later_calls_pass_over_its_rest(
    server: FakeServer, client: rollpack.Client
) -> None:
    serve_samples(server)
    with pytest.raises(rollpack.DeadlineExceeded):
        client.generate([[1]], timeout_s=5)
    assert server.requests[-1]["verb"] == "abort"
    assert server.requests[-1]["request_id"] == 1
    server.handlers["submit"] = lambda request, fds: {"request_id": 2}
    serve_samples(server, [0, 0], request_id=np.array([1, 2], "<i8"))
    (sample,) = client.generate([[1]])
    assert sample.request_id == 2
