"""Weights that change under load: what happens to live samples, and which updates are refused."""

from __future__ import annotations

import ctypes
import mmap
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import rollpack
import torch
from engine_process import Config, write_config
from rollpack.weights import Chunk, write_chunks
from safetensors.torch import load_file
from tiny_models import MODELS, TinyModel

Tensors = dict[str, torch.Tensor]
# Steps of milliseconds, so that client and server get their turns beside two busy ranks, and
# seconds of work in all.
MODEL = TinyModel("llama", {"hidden_size": 330, "intermediate_size": 800, "num_hidden_layers": 6,
                            "head_dim": 32}, seed=12)
PROMPTS = [{"prompt_id": f"p{index}", "input_ids": [7 + index, 50, 3 * index]}
           for index in range(24)]
NUM_SAMPLES, RESPONSE_LENGTH = 8, 250
NORM = "model.layers.1.post_attention_layernorm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The model that every server here starts from."""
    return MODEL.write(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def old(folder: pathlib.Path) -> Tensors:
    """The tensors of its file."""
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def new(old: Tensors) -> Tensors:
    """Others of the same shapes."""
    generator = torch.Generator().manual_seed(1)
    return {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            for name, tensor in old.items()}


@pytest.fixture
def config(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """Two slots, all logprob columns, responses long enough to be caught half-way."""
    layers: Config = {
        "model": {"path": folder},
        "rollout": {"n": NUM_SAMPLES, "response_length": RESPONSE_LENGTH, "ignore_eos": True},
        "engine": {"kv_cache_memory": "64MiB", "num_threads": 1, "max_num_seqs": 16},
        "bridge": {"slots": 2, "slot_bytes": "16MiB", "columns": ["logprobs"]}}
    return write_config(tmp_path / "config.yaml", layers)


@pytest.fixture
def client(config: pathlib.Path) -> Iterator[rollpack.Client]:
    """A fresh server of two ranks."""
    with rollpack.launch(config, num_ranks=2) as client:
        yield client


def _draw(client: rollpack.Client) -> list[tuple[bytes, bytes]]:
    """A few samples, tokens and logprobs, as bits."""
    samples = client.generate(PROMPTS[:4], n=2, sampling={"response_length": 20})
    return [(sample.response_ids.tobytes(), sample.logprobs.tobytes()) for sample in samples]


def _submit_load(client: rollpack.Client) -> None:
    """Submits more than fits at once and returns while its first samples are under way."""
    client.submit([{"prompt_id": "first", "input_ids": [1], "n": 1,
                    "sampling": {"response_length": 20}}])
    client.submit(PROMPTS)
    # A short group that started with them: when it is done, the others are 20 tokens further.
    with client.next_batch(num_groups=1) as batch:
        assert batch.num_samples == 1


def _collect(client: rollpack.Client) -> list[rollpack.Sample]:
    """Takes every sample of the load."""
    samples: list[rollpack.Sample] = []
    while len(samples) < NUM_SAMPLES * len(PROMPTS):
        with client.next_batch(timeout_s=60) as batch:
            assert not batch.failed
            samples += batch.samples(copy=True)
    keys = {(sample.prompt_id, sample.sample_index) for sample in samples}
    assert len(keys) == len(samples), "a sample came twice"
    return samples


def _assert_scored(client: rollpack.Client, samples: list[rollpack.Sample], version: int) -> None:
    """Each token stamped `version` has the bits that score gives now."""
    stamped = [sample for sample in samples if (sample.weight_versions == version).any()]
    for sample, scored in zip(stamped, client.score(stamped), strict=True):
        here = sample.weight_versions == version
        assert np.array_equal(sample.logprobs[here], scored.logprobs[here]), sample.prompt_id


def test_an_update_with_the_files_tensors_gives_the_files_bits(client: rollpack.Client,
                                                               old: Tensors, new: Tensors) -> None:
    before = _draw(client)
    loaded = client.get_weight_version().weights_hash
    updated = client.update_weights(new, version=1)
    assert updated == 1
    assert updated.weights_hash != loaded
    assert _draw(client) != before
    wrapped = {f"module._orig_mod.{name}": tensor.float() for name, tensor in old.items()}
    assert client.update_weights(wrapped, version=2) == 2
    version = client.get_weight_version()
    assert (version, version.weights_hash) == (2, loaded), "as packed from the file"
    assert (version.packing_ms, version.pause_ms) == (0, 0), "nothing had to wait for it"
    assert _draw(client) == before


def test_some_tensors_over_a_base_give_the_bits_of_all(client: rollpack.Client, old: Tensors,
                                                       new: Tensors) -> None:
    changed = {name: new[name] for name in (NORM, UP)}
    assert client.update_weights({**old, **changed}, version=1) == 1
    whole = _draw(client)
    assert client.update_weights(old, version=2) == 2
    assert _draw(client) != whole
    assert client.update_weights(changed, version=3, base_version=2) == 3
    assert _draw(client) == whole
    with pytest.raises(rollpack.InvalidArgument, match="base_version.*= 2.*3, the current version"):
        client.update_weights(changed, version=4, base_version=2)
    assert _draw(client) == whole


def test_keep_goes_on_under_the_new_weights(client: rollpack.Client, old: Tensors,
                                            new: Tensors) -> None:
    _submit_load(client)
    version = client.update_weights(new, version=1, mode="keep")
    assert version == 1
    assert 0 < version.packing_ms < 5000
    assert 0 < version.pause_ms < 5000
    samples = _collect(client)
    assert all(sample.finish_reason == "length" for sample in samples)
    assert all((np.diff(sample.weight_versions) >= 0).all() for sample in samples)
    mixed = [sample for sample in samples if len(set(sample.weight_versions.tolist())) == 2]
    assert mixed, "no sample was under way"
    _assert_scored(client, samples, version=1)
    stats = client.stats()
    assert stats["last_update_packing_ms"] == version.packing_ms
    assert stats["last_update_pause_ms"] == version.pause_ms
    assert 0 < stats["last_update_prefill_ms"] < 20000
    client.update_weights(old, version=2)
    _assert_scored(client, samples, version=0)


def test_wait_finishes_live_samples_under_the_old_weights(client: rollpack.Client,
                                                          old: Tensors, new: Tensors) -> None:
    _submit_load(client)
    assert client.update_weights(new, version=1, mode="wait") == 1
    samples = _collect(client)
    assert all(sample.finish_reason == "length" for sample in samples)
    versions = {tuple(set(sample.weight_versions.tolist())) for sample in samples}
    assert versions <= {(0,), (1,)} and (0,) in versions
    _assert_scored(client, samples, version=1)
    client.update_weights(old, version=2)
    _assert_scored(client, samples, version=0)


def test_abort_hands_live_samples_back(client: rollpack.Client, new: Tensors) -> None:
    _submit_load(client)
    assert client.update_weights(new, version=1, mode="abort") == 1
    samples = _collect(client)
    aborted = [sample for sample in samples if sample.finish_reason == "abort"]
    assert any(0 < len(sample.response_ids) < RESPONSE_LENGTH for sample in aborted)
    assert all((sample.weight_versions == 0).all() for sample in aborted)
    _assert_scored(client, samples, version=1)


def _refused(name: str, tensors: dict[str, Any], *parts: str) -> Any:
    return pytest.param(tensors, parts, id=name)


@pytest.mark.parametrize(("changes", "parts"), [
    _refused("missing", {NORM: None}, NORM),
    _refused("extra", {"model.layers.9.mlp.up_proj.weight": torch.zeros(800, 330)},
             "model.layers.9.mlp.up_proj.weight"),
    _refused("misshapen", {NORM: torch.ones(331)}, NORM, "331", "330"),
    _refused("transposed", {UP: torch.zeros(330, 800)}, UP, "[800, 330]"),
    _refused("not-finite", {UP: torch.zeros(800, 330).index_fill_(0, torch.tensor(799), torch.nan)},
             UP + "[799, 0]", "nan"),
    _refused("dtype", {NORM: torch.ones(330, dtype=torch.int32)}, NORM, "int32"),
    _refused("adapter", {"model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(4, 330)},
             "lora_A", "merge")])
def test_a_wrong_tensor_is_named_and_the_old_weights_stay(
        changes: dict[str, torch.Tensor | None], parts: tuple[str, ...], client: rollpack.Client,
        new: Tensors) -> None:
    before = _draw(client)
    tensors = {name: tensor for name, tensor in {**new, **changes}.items() if tensor is not None}
    with pytest.raises(rollpack.RollpackError) as error:
        client.update_weights(tensors, version=1)
    for part in parts:
        assert part in str(error.value)
    assert client.get_weight_version() == 0
    assert _draw(client) == before
    assert client.update_weights(new, version=1) == 1, "a good update works afterwards"


def test_a_corrupt_tensor_is_named_and_the_old_weights_stay(
        client: rollpack.Client, new: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupted(*arguments: Any) -> Iterator[Chunk]:
        for chunk in write_chunks(*arguments):
            for tensor in chunk.manifest:
                tensor["crc32"] ^= tensor["name"] == NORM
            yield chunk

    before = _draw(client)
    with monkeypatch.context() as patch:
        patch.setattr("rollpack.session.write_chunks", corrupted)
        with pytest.raises(rollpack.DataLoss, match=NORM):
            client.update_weights(new, version=1, copy=True)
    assert client.get_weight_version() == 0
    assert _draw(client) == before


@pytest.mark.parametrize(("num_ranks", "share_weights"), [(1, "off"), (2, "on"), (2, "off")])
def test_tensors_are_packed_where_they_lie_and_out_of_copies_alike(
        num_ranks: int, share_weights: str, config: pathlib.Path, new: Tensors) -> None:
    overrides = {"engine.share_weights": share_weights}
    with rollpack.launch(config, num_ranks=num_ranks, set=overrides) as client:
        # Of two ranks that pack for themselves, one is another process than the server.
        assert client.info.reads_memory == (share_weights == "on" or num_ranks == 1)
        hashes = [client.update_weights(new, 1).weights_hash,
                  client.update_weights(new, 2, copy=True).weights_hash,
                  client.update_weights(iter(new.items()), 3).weights_hash,
                  client.update_weights({name: tensor.t().contiguous().t()
                                         for name, tensor in new.items()}, 4).weights_hash]
        assert len(set(hashes)) == 1
        changed = {NORM: new[NORM] + 1}
        assert client.update_weights(changed, 5, base_version=4).weights_hash != hashes[0]
        assert client.update_weights({NORM: new[NORM]}, 6, base_version=5).weights_hash == hashes[0]


def test_memory_that_is_not_there_is_named_and_the_old_weights_stay(
        config: pathlib.Path, new: Tensors) -> None:
    libc = ctypes.CDLL(None)
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    with rollpack.launch(config) as client:
        before = _draw(client)
        shape = new[UP].shape
        num_bytes = 4 * new[UP].numel()
        region = mmap.mmap(-1, num_bytes)
        gone = np.frombuffer(region, np.float32, new[UP].numel()).reshape(shape)
        page = mmap.PAGESIZE
        last = gone.ctypes.data + (num_bytes - 1) // page * page
        assert libc.munmap(last, page) == 0  # nothing here reads its last rows
        with pytest.raises(rollpack.InvalidArgument, match=f"(?s){UP}.*copy=True"):
            client.update_weights({**new, UP: gone}, version=1)
        assert client.get_weight_version() == 0
        assert _draw(client) == before
        assert client.update_weights(new, version=1) == 1
        assert _draw(client) != before


@pytest.mark.parametrize("share_weights", ["on", "off"])
def test_a_tied_head_may_be_sent_if_it_is_the_embedding(share_weights: str, config: pathlib.Path,
                                                        tmp_path: pathlib.Path) -> None:
    folder = MODELS["qwen2-tied"].write(tmp_path / "tied")
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    overrides = {"model.path": folder, "engine.share_weights": share_weights}
    with rollpack.launch(config, num_ranks=2, set=overrides) as client:
        before = _draw(client)
        client.update_weights({**tensors, "lm_head.weight": embedding}, version=1)
        assert _draw(client) == before
        with pytest.raises(rollpack.RollpackError, match="lm_head.weight"):
            client.update_weights({**tensors, "lm_head.weight": embedding * 2}, version=2)
        assert client.get_weight_version() == 1
        assert _draw(client) == before
