"""Batches as files, and `rollpack inspect` on them and on a running server."""

from __future__ import annotations

import os
import stat
import subprocess
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import rollpack

from fake_server import FakeServer, encode_batch, packed_columns
from real_server import Start
from test_batch import PADDED, serve

_ROOT = Path(__file__).resolve().parents[3]
_BINARY = os.environ.get("ROLLPACK_BINARY", str(_ROOT / "build" / "rollout" / "rollpack"))
_SVG = "{http://www.w3.org/2000/svg}"


def inspect(*arguments: str | Path) -> str:
    """What `rollpack inspect` prints."""
    command = [_BINARY, "inspect", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*arguments: str | Path) -> str:
    """What it says where it fails."""
    command = [_BINARY, "inspect", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    return done.stderr


def by_class(svg: Path) -> dict[str, int]:
    """How many elements of each class a picture has; the file is one XML document."""
    root = ElementTree.parse(svg).getroot()
    assert root.tag == f"{_SVG}svg"
    counts: dict[str, int] = {}
    for element in root.iter():
        name = element.get("class", "")
        counts[name] = counts.get(name, 0) + 1
    return counts


def test_a_saved_file_holds_the_bytes_of_the_slot(
    server: FakeServer, client: rollpack.Client, tmp_path: Path
) -> None:
    encoded = encode_batch(packed_columns())
    serve(server, encoded)
    with client.next_batch() as batch:
        batch.save(tmp_path / "batch")
        batch.save(tmp_path / "batch")  # over the first
    assert (tmp_path / "batch").read_bytes() == encoded
    assert [file.name for file in tmp_path.iterdir() if "batch" in file.name] == ["batch"]
    mode = (tmp_path / "batch").stat().st_mode
    umask = os.umask(0o022)
    os.umask(umask)
    assert stat.S_IMODE(mode) == 0o666 & ~umask


def test_writes_in_place_are_saved_under_a_checksum_that_fits(
    server: FakeServer, client: rollpack.Client, tmp_path: Path
) -> None:
    encoded = encode_batch(packed_columns())
    serve(server, encoded)
    with client.next_batch() as batch:
        batch.torch("temperature")[0] = 0.25
        batch.save(tmp_path / "batch")
    saved = (tmp_path / "batch").read_bytes()
    assert saved != encoded
    assert int.from_bytes(saved[40:44], "little") == zlib.crc32(saved[64:])


def test_what_cannot_be_saved_leaves_no_file(
    server: FakeServer, client: rollpack.Client, tmp_path: Path
) -> None:
    serve(server, encode_batch(packed_columns()))
    batch = client.next_batch()
    with pytest.raises(FileNotFoundError):
        batch.save(tmp_path / "none" / "batch")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        batch.save(tmp_path / "folder")
    batch.release()
    with pytest.raises(rollpack.FailedPrecondition, match="batch 1: take what you need before"):
        batch.save(tmp_path / "batch")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "s"]


def test_inspect_draws_a_saved_padded_batch(
    server: FakeServer, client: rollpack.Client, tmp_path: Path
) -> None:
    serve(server, encode_batch(PADDED), num_samples=2)
    with client.next_batch() as batch:
        batch.save(tmp_path / "batch")
    text = inspect(tmp_path / "batch", "--svg", tmp_path / "svg")
    assert "padded: 2 samples of 2 groups in 2 rows\n" in text
    assert "tokens: 7 = 4 prompt + 3 response; 3 in the loss\n" in text
    assert "pads: 3 of 10 cells (30.0%); packed they were none\n" in text
    assert "  mask    --.##\n" in text
    assert "  mask    ...#-\n" in text
    counts = by_class(tmp_path / "svg")
    assert (counts["row"], counts["prompt"], counts["response"]) == (2, 2, 2)
    assert (counts["pad"], counts["loss"], counts["attention"]) == (2, 2, 2)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_inspect_counts_what_a_real_server_delivered(
    start: Start, tmp_path: Path, layout: str
) -> None:
    server = start("--layout", layout)
    with rollpack.connect(server.path) as client:
        client.submit([[1, 2, 3], [4], list(range(20))], n=4)
        with client.next_batch(3) as batch:
            batch.save(tmp_path / "batch")
            prompts, responses = batch.prompt_lens.astype(int), batch.response_lens.astype(int)
            num_rows = batch.num_rows or 12
            # A server is looked at while a trainer holds the batch, and shows the same.
            of_file, of_server = inspect(tmp_path / "batch"), inspect(server.path)
        with pytest.raises(rollpack.DeadlineExceeded):
            client.next_batch(timeout_s=0.1)
    assert of_server.splitlines()[0] == f"{server.path} slot 0: delivered"
    assert of_file.splitlines()[1:] == of_server.splitlines()[1:]
    total = prompts.sum() + responses.sum()
    assert f"{layout}: 12 samples of 3 groups in {num_rows} rows\n" in of_file
    assert (
        f"tokens: {total} = {prompts.sum()} prompt + {responses.sum()} response; "
        f"{responses.sum()} in the loss\n"
    ) in of_file
    inspect(tmp_path / "batch", "--svg", tmp_path / "svg", "--limit", "100")
    counts = by_class(tmp_path / "svg")
    assert (counts["row"], counts["prompt"], counts["response"]) == (num_rows, 12, 12)
    assert counts["attention"] == 12
    pads = np.count_nonzero(prompts < prompts.max()) + np.count_nonzero(
        responses < responses.max()
    )
    assert counts.get("pad", 0) == (pads if layout == "padded" else 0)


def test_inspect_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    encoded = encode_batch(packed_columns())
    path = tmp_path / "batch"
    for damaged, error in [
        (encoded[:-1], "data_loss: bytes = "),
        (encoded[:70], "data_loss: bytes = "),
        (b"RPKBITCH" + encoded[8:], "data_loss: magic = RPKBITCH"),
        (encoded[:-1] + bytes([encoded[-1] ^ 1]), "data_loss: crc32 = "),
        (b"", "data_loss: batch = 0 bytes"),
    ]:
        path.write_bytes(damaged)
        assert refused(path).startswith(f"rollpack: {error}")
    assert refused(tmp_path / "none").startswith("rollpack: not_found: BATCH = ")
    path.write_bytes(encoded)
    assert "--row = 9: expected 0 to 1" in refused(path, "--row", "9")
    assert "--slot = 1: expected nothing for a file" in refused(path, "--slot", "1")
    (tmp_path / "old").write_text("old")
    path.write_bytes(encoded[:-1])
    refused(path, "--svg", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old"
