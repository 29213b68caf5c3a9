"""Views under other trainers' names, each against NumPy that lays out sample by sample."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import rollpack
import torch

from fake_server import FakeServer, encode_batch
from real_server import Start

PAD = 9  # an ordinary token as well: nothing may compare with it
PROMPT_LENS, RESPONSE_LENS = [3, 1, 4, 1, 2], [2, 5, 0, 1, 3]
Columns = dict[str, np.ndarray]


class Made:
    """Five samples, with the columns that a packed and a padded batch has of them."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.prompts = [rng.integers(8, 11, n) for n in PROMPT_LENS]
        self.responses = [rng.integers(8, 11, n) for n in RESPONSE_LENS]
        self.log_probs = [-rng.random(n, dtype="f4") for n in RESPONSE_LENS]
        self.entropy = [rng.random(n, dtype="f4") for n in RESPONSE_LENS]
        self.lens = [p + r for p, r in zip(PROMPT_LENS, RESPONSE_LENS)]
        self.per_sample = {
            "prompt_lens": np.array(PROMPT_LENS, "<i4"),
            "response_lens": np.array(RESPONSE_LENS, "<i4"),
            "finish_reason": np.array([0, 1, 2, 1, 0], "|u1"),
        }

    def packed(self) -> Columns:
        nan = [np.full(n, np.nan, "<f4") for n in PROMPT_LENS]
        joined = [part for pair in zip(self.prompts, self.responses) for part in pair]
        mask = np.concatenate([[0] * p + [1] * r for p, r in zip(PROMPT_LENS, RESPONSE_LENS)])
        return {
            "input_ids": np.concatenate(joined).astype("<i4"),
            "position_ids": np.concatenate([np.arange(n) for n in self.lens]).astype("<i4"),
            "segment_ids": np.repeat(np.arange(5), self.lens).astype("<i4"),
            "cu_seqlens": np.cumsum([0, *self.lens]).astype("<i4"),
            "row_starts": np.array([0, 2, 5], "<i4"),
            "loss_mask": mask.astype("|u1"),
            "weight_versions": np.where(mask, 6, -1).astype("<i4"),
            "rollout_log_probs": _alternate(nan, self.log_probs),
            "entropy": _alternate(nan, self.entropy),
            **self.per_sample,
        }

    def padded(self, prompt_width: int = 4, response_width: int = 5) -> Columns:
        rows = self.two_sided(prompt_width, response_width)
        return {name: column for name, column in rows.items() if name != "prompt_mask"} | (
            self.per_sample
        )

    def two_sided(self, prompt_width: int, response_width: int) -> Columns:
        """The rows of verl and TRL, one by one: prompts on the right of their part."""
        prompts = np.full((5, prompt_width), PAD, "<i8")
        responses = np.full((5, response_width), PAD, "<i8")
        prompt_mask, response_mask = np.zeros_like(prompts), np.zeros_like(responses)
        log_probs = np.zeros(responses.shape, "<f4")
        entropy = np.zeros(responses.shape, "<f4")
        for b, (p, r) in enumerate(zip(PROMPT_LENS, RESPONSE_LENS)):
            prompts[b, prompt_width - p :] = self.prompts[b]
            prompt_mask[b, prompt_width - p :] = 1
            responses[b, :r] = self.responses[b]
            response_mask[b, :r] = 1
            log_probs[b, :r] = self.log_probs[b]
            entropy[b, :r] = self.entropy[b]
        attention_mask = np.concatenate([prompt_mask, response_mask], axis=1)
        return {
            "prompts": prompts,
            "responses": responses,
            "input_ids": np.concatenate([prompts, responses], axis=1),
            "attention_mask": attention_mask,
            "position_ids": np.clip(np.cumsum(attention_mask, axis=1) - 1, 0, None),
            "response_mask": response_mask,
            "rollout_log_probs": log_probs,
            "entropy": entropy,
            "prompt_mask": prompt_mask,
        }

    def right_padded(self, width: int) -> Columns:
        """Whole sequences with all pads on the right, and what is known of each sampled token."""
        ids, real = np.full((5, width), PAD, "<i8"), np.zeros((5, width), "<i8")
        sampled = np.zeros((5, width), bool)
        log_probs, entropy = np.zeros((5, width), "<f4"), np.zeros((5, width), "<f4")
        for b, (p, n) in enumerate(zip(PROMPT_LENS, self.lens)):
            ids[b, :n] = [*self.prompts[b], *self.responses[b]]
            real[b, :n] = 1
            sampled[b, p:n] = True
            log_probs[b, p:n] = self.log_probs[b]
            entropy[b, p:n] = self.entropy[b]
        return {
            "ids": ids, "real": real, "sampled": sampled, "log_probs": log_probs, "entropy": entropy
        }  # fmt: skip


def _alternate(of_prompts: list[np.ndarray], of_responses: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([part for pair in zip(of_prompts, of_responses) for part in pair])


MADE = Made()


@pytest.fixture(params=["packed", "padded"])
def batch(
    request: pytest.FixtureRequest, server: FakeServer, client: rollpack.Client
) -> Iterator[rollpack.Batch]:
    columns = MADE.packed() if request.param == "packed" else MADE.padded()
    with taken(server, client, columns) as opened:
        yield opened


def taken(server: FakeServer, client: rollpack.Client, columns: Columns) -> rollpack.Batch:
    encoded = encode_batch(columns, alignments=dict.fromkeys(["rollout_log_probs", "entropy"], 1))
    server.handlers["next_batch"] = lambda message, fds: server.deliver(0, encoded, num_samples=5)
    return client.next_batch()


def check(view: rollpack.LayoutView, expected: Columns) -> None:
    """Names, dtypes, shapes and values; NaN equals NaN; torch tensors lie on the same memory."""
    assert set(view) == set(expected)
    tensors = view.torch()
    for name, array in expected.items():
        assert view[name].dtype == array.dtype, name
        np.testing.assert_array_equal(view[name], array, err_msg=name)
        assert tensors[name].data_ptr() == view[name].ctypes.data
        np.testing.assert_array_equal(tensors[name].numpy(), array, err_msg=name)


def verl(prompt_width: int = 4, response_width: int = 5) -> Columns:
    rows = MADE.two_sided(prompt_width, response_width)
    del rows["prompt_mask"]
    return rows


def trl(prompt_width: int = 4, response_width: int = 5) -> Columns:
    rows = MADE.two_sided(prompt_width, response_width)
    return {
        "prompt_ids": rows["prompts"],
        "prompt_mask": rows["prompt_mask"],
        "completion_ids": rows["responses"],
        "completion_mask": rows["response_mask"],
        "sampling_per_token_logps": rows["rollout_log_probs"],
        "entropy": rows["entropy"],
    }


def openrlhf(width: int = 6) -> Columns:
    rows = MADE.right_padded(width)
    return {
        "sequences": rows["ids"],
        "attention_mask": rows["real"],
        "action_mask": rows["sampled"][:, 1:],  # entry t - 1 is about token t
        "rollout_log_probs": rows["log_probs"][:, 1:],
        "entropy": rows["entropy"][:, 1:],
        "response_length": np.array(RESPONSE_LENS, "<i8"),
        "total_length": np.array(MADE.lens, "<i8"),
        "truncated": np.array([False, True, False, True, False]),
    }


def nemo_rl(width: int = 6) -> Columns:
    rows = MADE.right_padded(width)
    lengths = np.array(MADE.lens, "<i8")
    return {
        "input_ids": rows["ids"],
        "input_lengths": lengths,
        "token_mask": rows["sampled"].astype("<i8"),
        "sample_mask": np.ones(5, "<i8"),
        "generation_logprobs": rows["log_probs"],
        "entropy": rows["entropy"],
        "generation_lengths": np.array(RESPONSE_LENS, "<i8"),
        "unpadded_sequence_lengths": lengths,
        "truncated": np.array([False, True, False, True, False]),
    }


def flash_attn_varlen() -> Columns:
    packed = MADE.packed()
    dropped = ("row_starts", *MADE.per_sample)
    return {name: column for name, column in packed.items() if name not in dropped}


EXPECTED = {"verl": verl, "trl": trl, "openrlhf": openrlhf, "nemo_rl": nemo_rl}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_padded_view_is_what_numpy_lays_out_sample_by_sample(
    batch: rollpack.Batch, name: str
) -> None:
    view = batch.view(name, pad_token_id=PAD)
    check(view, EXPECTED[name]())
    assert (view.name, view.max_seqlen) == (name, 6)


def test_the_varlen_view_is_what_numpy_lays_out_sample_by_sample(batch: rollpack.Batch) -> None:
    expected = flash_attn_varlen()
    if batch.layout == "padded":  # which does not say the versions of single tokens
        del expected["weight_versions"]
    view = batch.view("flash_attn_varlen")
    check(view, expected)
    assert view.max_seqlen == 6


def test_what_lies_in_the_slot_as_a_view_wants_it_is_not_copied(batch: rollpack.Batch) -> None:
    is_packed = batch.layout == "packed"
    for name in ("verl", "trl", "flash_attn_varlen"):
        view = batch.view(name, **({} if name == "flash_attn_varlen" else {"pad_token_id": PAD}))
        shares = (name == "flash_attn_varlen") == is_packed
        assert view.copied == (set() if shares else set(view))
        for array in view.values():
            assert np.shares_memory(array, batch["input_ids"].base.base) == shares
    assert batch.view("openrlhf").copied == set(batch.view("openrlhf"))


def test_a_write_into_a_shared_view_is_seen_by_the_batch_alone(
    server: FakeServer, client: rollpack.Client
) -> None:
    with taken(server, client, MADE.padded()) as batch:
        batch.view("trl").torch("completion_ids")[1, 4] = 77
        assert batch["responses"][1, 4] == 77
        with pytest.raises(ValueError, match="read-only"):
            batch.view("trl")["completion_ids"][1, 4] = 1


def test_widths_are_fixed_or_rounded_up(batch: rollpack.Batch) -> None:
    two_sided = {"prompt_width": 7, "response_width": 8, "pad_token_id": PAD}
    check(batch.view("verl", **two_sided), verl(7, 8))
    check(batch.view("trl", **two_sided), trl(7, 8))
    check(batch.view("verl", pad_to_multiple_of=4, pad_token_id=PAD), verl(4, 8))
    check(batch.view("trl", pad_to_multiple_of=3, prompt_width=4, pad_token_id=PAD), trl(4, 6))
    check(batch.view("openrlhf", width=11, pad_token_id=PAD), openrlhf(11))
    check(batch.view("openrlhf", pad_to_multiple_of=16, pad_token_id=PAD), openrlhf(16))
    check(batch.view("nemo_rl", pad_to_multiple_of=4, pad_token_id=PAD), nemo_rl(8))


def test_widths_of_the_padded_layout_are_kept_without_a_copy(
    server: FakeServer, client: rollpack.Client
) -> None:
    with taken(server, client, MADE.padded(8, 16)) as batch:
        for options in ({}, {"prompt_width": 8, "response_width": 16}, {"pad_to_multiple_of": 4}):
            view = batch.view("verl", **options)
            assert not view.copied
            check(view, verl(8, 16))
        narrow = batch.view("verl", prompt_width=4, response_width=5, pad_token_id=PAD)
        check(narrow, verl(4, 5))


def test_the_servers_pad_id_is_the_default(batch: rollpack.Batch) -> None:
    pads = batch.view("openrlhf")["sequences"][openrlhf()["attention_mask"] == 0]
    assert pads.size > 0
    assert set(pads.tolist()) == {0}  # hello's pad_token_id


def test_a_row_is_laid_out_like_a_batch(server: FakeServer, client: rollpack.Client) -> None:
    with taken(server, client, MADE.packed()) as batch:
        first, second = batch.rows()
        whole, part = nemo_rl(6), second.view("nemo_rl", pad_token_id=PAD, width=6)
        check(part, {name: array[2:] for name, array in whole.items()})
        check(first.view("trl", prompt_width=4, pad_token_id=PAD),
              {name: array[:2] for name, array in trl().items()})  # fmt: skip
        varlen = second.view("flash_attn_varlen")
        assert varlen.copied == {"cu_seqlens"}
        assert varlen["cu_seqlens"].tolist() == [0, 4, 6, 11]
        np.testing.assert_array_equal(varlen["input_ids"], batch["input_ids"][11:])
        del first, second, varlen


def test_alignment_is_said_by_name(batch: rollpack.Batch) -> None:
    assert batch.view("openrlhf").alignment("rollout_log_probs") == "predictor"
    assert batch.view("openrlhf").alignment("action_mask") == "predictor"
    assert batch.view("nemo_rl").alignment("generation_logprobs") == "token"
    with pytest.raises(KeyError, match="column = reward: expected one of input_ids"):
        batch.view("nemo_rl").alignment("reward")


def test_predictor_alignment_indexes_the_logits_that_drew_the_token(batch: rollpack.Batch) -> None:
    """gather(logits[:, :-1], sequences[:, 1:]) and the view's entries speak of the same tokens."""
    view = batch.view("openrlhf")
    labels = view.torch("sequences")[:, 1:]
    drawn = labels[view.torch("action_mask")]
    np.testing.assert_array_equal(drawn, np.concatenate(MADE.responses))
    log_probs = view.torch("rollout_log_probs")[view.torch("action_mask")]
    assert torch.equal(log_probs, torch.from_numpy(np.concatenate(MADE.log_probs)))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("verl2", {}, "view = 'verl2': expected one of verl, trl, openrlhf, nemo_rl, flash_attn"),
        ("verl", {"prompt_width": 3}, "prompt_width = 3: expected at least 4, the longest of the"),
        ("nemo_rl", {"width": 5}, "width = 5: expected at least 6, the longest of the batch"),
        ("verl", {"width": 9}, r"width = 9 \(view verl\): expected one of pad_to_multiple_of, pro"),
        ("flash_attn_varlen", {"width": 9}, "expected no option: it has no pads"),
        ("trl", {"pad_to_multiple_of": 0}, "pad_to_multiple_of = 0: expected 1 or more"),
    ],
)
def test_a_wrong_option_is_refused(
    batch: rollpack.Batch, name: str, options: dict[str, int], text: str
) -> None:
    with pytest.raises(rollpack.InvalidArgument, match=text):
        batch.view(name, **options)


def test_a_batch_of_failures_alone_has_no_view(start: Start) -> None:
    with rollpack.connect(start().path) as client:
        client.submit([[63]])
        batch = client.next_batch(timeout_s=20)
        with pytest.raises(rollpack.FailedPrecondition, match="failures alone: expected a batch"):
            batch.view("verl")


def test_widths_of_the_configuration_need_no_copy(start: Start) -> None:
    server = start("--layout", "padded", "--widths", "32,0,32")
    with rollpack.connect(server.path) as client:
        client.submit([[5, 6, 7], [1]], n=2)
        with client.next_batch(2, timeout_s=20) as batch:
            view = batch.view("trl", prompt_width=32)
            assert (view["prompt_ids"].shape, view["completion_ids"].shape) == ((4, 32), (4, 32))
            assert not view.copied
            del view


@pytest.mark.parametrize("name", [*EXPECTED, "flash_attn_varlen"])
def test_both_layouts_of_the_server_give_the_same_view(start: Start, name: str) -> None:
    views = []
    for layout in ("packed", "padded"):
        with rollpack.connect(start("--layout", layout).path) as client:
            client.submit([[5, 6, 7], [1], [9, 8, 7]], n=2, sampling={"stop_token_ids": [20, 9]})
            with client.next_batch(3, timeout_s=20) as batch:  # all in one row: the same order
                view = batch.view(name)
                views.append({name: array.copy() for name, array in view.items()})
                del view
    packed, padded = views
    packed.pop("weight_versions", None)
    assert set(packed) == set(padded)
    for key, array in packed.items():
        np.testing.assert_array_equal(array, padded[key], err_msg=key)
        assert array.dtype == padded[key].dtype
