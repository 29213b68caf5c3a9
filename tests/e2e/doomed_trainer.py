"""A trainer that dies: takes batches, keeps what it has learned in a checkpoint, ends where told.

    doomed_trainer.py SOCKET FOLDER [NUM_BATCHES PHASE]

In FOLDER, `deliveries` gets a line for every batch that came, its batch_seq and a digest of its
samples; `checkpoint.json` holds the samples that were learned from, each with its digest, and the
In FOLDER, `deliveries` gets a line for each batch that came: its batch_seq and a digest of its
it goes on until no batch comes any more.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import signal
import sys

import rollpack

# In the order in which a batch goes through them.
PHASES = ("deliver", "step", "save", "saved", "ack", "acked")


def main(socket: str, folder: pathlib.Path, num_batches: int = 0, phase: str = "") -> None:
    """Trains until told to die, or until nothing is left."""
    batch_number = 0

    def reach(name: str) -> None:
        if batch_number == num_batches and name == phase:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint = folder / "checkpoint.json"
    saved = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"learned": {}}
    learned = saved["learned"]
    with (rollpack.connect(socket, resume=saved.get("state")) as client,
          (folder / "deliveries").open("a") as deliveries):
        while True:
            try:
                batch = client.next_batch(1, timeout_s=0.5 if num_batches == 0 else 30)
            except rollpack.DeadlineExceeded:
                return
            batch_number += 1
            assert not batch.failed
            digests = {}
            for sample in batch.samples():
                name = f"{sample.prompt_id}/{sample.sample_index}"
                numbers = sample.response_ids.tobytes() + sample.rollout_log_probs.tobytes()
                digests[name] = hashlib.sha256(numbers).hexdigest()
            deliveries.write(json.dumps([batch.batch_seq, digests]) + "\n")
            deliveries.flush()
            reach("deliver")
            for name, digest in digests.items():
                assert name not in learned, f"{name} came twice"
                learned[name] = digest
            del sample  # its arrays are views on the batch's memory
            reach("step")
            temporary = folder / "checkpoint.new"
            temporary.write_text(json.dumps({"learned": learned,
                                             "state": client.state_dict([batch])}))
            reach("save")
            temporary.replace(checkpoint)
            reach("saved")
            batch.release()
            reach("ack")
            client.get_weight_version()  # answered after the release was
            reach("acked")


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]), int((sys.argv[3:] or ["0"])[0]),
         (sys.argv[4:] or [""])[0])
