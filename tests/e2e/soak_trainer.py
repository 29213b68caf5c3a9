"""The soak's trainer: soak_trainer.py SOCKET JOURNAL. Ends when it is killed.

Every line of the journal is a batch: its samples with their digests, and the client's state_dict:
what was learned and what the server need not send again are written in one go.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import sys

import rollpack


def digests_of(batch: rollpack.Batch) -> list[tuple[int, str, str]]:
    """Returns (request, prompt/sample, digest) of each sample."""
    found = []
    for sample in batch.samples():
        numbers = sample.response_ids.tobytes() + sample.rollout_log_probs.tobytes()
        found.append((int(sample.request_id), f"{sample.prompt_index}/{sample.sample_index}",
                      hashlib.sha256(numbers).hexdigest()[:16]))
    return found


def train(socket: str, journal: pathlib.Path) -> None:
    """Learns from whatever comes: a line of the journal says what, and the client's state."""
    journal.touch()
    text = journal.read_bytes()
    whole = text[:text.rfind(b"\n") + 1]
    os.truncate(journal, len(whole))  # a line that a kill cut off counts for nothing
    state = json.loads(whole.splitlines()[-1])["state"] if whole else None
    with rollpack.connect(socket, resume=state) as client, journal.open("a") as log:
        while True:
            try:
                batch = client.next_batch(timeout_s=1)
            except rollpack.DeadlineExceeded:
                continue
            assert not batch.failed, [failed.error for failed in batch.failed]
            with batch:
                line = {"samples": digests_of(batch), "state": client.state_dict([batch])}
                log.write(json.dumps(line) + "\n")
                log.flush()


def learned_from(journal: pathlib.Path) -> list[tuple[int, str, str]]:
    """Returns what the trainers' journal says, in order."""
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    return [tuple(sample) for line in lines for sample in json.loads(line)["samples"]]


if __name__ == "__main__":
    train(sys.argv[1], pathlib.Path(sys.argv[2]))
