"""What an update of all weights costs while samples are drawn: its rate, and how long steps wait.

    .venv/bin/python tests/bench/update_weights.py --model MODEL [--ranks 1,2] [--updates 5]

Prints a row a configuration, medians over the updates after the first: the whole call (tensors
packed out of this process's memory by one rank, or copied into shared memory, checked and packed by
every rank; then switched); of the rank that stood still longest the time for packing; all bytes
over the time of all else, which is how much coming in adds to packing;
the pause beyond packing and the prefill of live samples, as the engine reports them; last, from
updates of their own, since asking takes time from them, the longest time between two tokens of a
sample of length one that was asked for over and over, which sees all three and the wait for its
turn. Beside them the limit of the machine.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import tempfile
import threading
import time

import rollpack
from rollpack.weights import CHUNK_BYTES
from safetensors.torch import load_file

NUM_PROMPTS, NUM_SAMPLES, RESPONSE_LENGTH = 4, 8, 2000
COLUMNS = ("ranks", "weights", "GB", "update s", "packing ms", "ingest GB/s", "pause ms",
           "prefill ms", "longest wait for a token ms")


class Probe:
    """Scores one token again and again: each needs a step."""

    def __init__(self, socket: str) -> None:
        """Starts to ask."""
        self.longest_ms = 0.0
        self._socket = socket
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        with rollpack.connect(self._socket) as client:
            while not self._ends.is_set():
                start = time.monotonic()
                client.score([{"input_ids": [1], "response_ids": [2]}])
                self.longest_ms = max(self.longest_ms, 1000 * (time.monotonic() - start))

    def stop(self) -> None:
        """Stops asking."""
        self._ends.set()
        self._thread.join()


def memory_limit() -> float:
    """GB/s at which one thread writes shared memory that is new, as an update in copies has to."""
    data = memoryview(bytes(CHUNK_BYTES))
    rates = []
    for _ in range(8):
        fd = os.memfd_create("limit")
        start = time.monotonic()
        num_written = os.pwrite(fd, data, 0)
        rates.append(num_written / (time.monotonic() - start) / 1e9)
        os.close(fd)
    return max(rates)


def measure(model: pathlib.Path, num_ranks: int, sharing: str, num_updates: int) -> list[str]:
    """Returns the row of one configuration."""
    tensors = load_file(model / "model.safetensors")
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    rows: list[list[float]] = []
    waits: list[float] = []
    with tempfile.TemporaryDirectory(prefix="update-") as folder:
        config = pathlib.Path(folder) / "config.yaml"
        config.write_text(
            f"model: {{path: {model}}}\n"
            f"rollout: {{n: {NUM_SAMPLES}, response_length: {RESPONSE_LENGTH}, ignore_eos: true}}\n"
            f"engine: {{kv_cache_memory: 512MiB, share_weights: {sharing}}}\n")
        socket = f"{folder}/s/rollpack.sock"
        with rollpack.launch(config, num_ranks=num_ranks, set={"bridge.socket": socket}) as client:
            client.submit([[1 + index, 2, 3] for index in range(NUM_PROMPTS)])
            time.sleep(1)
            for version in range(1, 2 * num_updates + 2):
                is_probed = version % 2 == 1
                probe = Probe(socket) if is_probed else None
                start = time.monotonic()
                updated = client.update_weights(tensors, version)
                seconds = time.monotonic() - start
                time.sleep(2)  # workers tell their numbers once a second
                while (prefill_ms := client.stats()["last_update_prefill_ms"]) == 0:
                    time.sleep(0.1)
                if probe is not None:
                    probe.stop()
                    waits.append(probe.longest_ms)
                else:
                    ingest = num_bytes / 1e9 / (seconds - updated.packing_ms / 1e3)
                    rows.append([seconds, updated.packing_ms, ingest, updated.pause_ms, prefill_ms])
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    medians.append(statistics.median(waits[1:]))  # the first finds memory that was never used
    texts = [f"{medians[0]:.2f}", f"{medians[1]:.0f}", f"{medians[2]:.2f}",
             *(f"{value:.0f}" for value in medians[3:])]
    return [str(num_ranks), "one copy" if sharing == "on" else "a copy a rank",
            f"{num_bytes / 1e9:.2f}", *texts]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--updates", type=int, default=5)
    arguments = parser.parse_args()
    limit = memory_limit()
    print("|" + "|".join(COLUMNS) + "|\n" + "|---" * len(COLUMNS) + "|")
    for num_ranks in map(int, arguments.ranks.split(",")):
        for sharing in ("off", "on") if num_ranks > 1 else ("off",):
            row = measure(arguments.model.resolve(), num_ranks, sharing, arguments.updates)
            print("|" + "|".join(row) + "|", flush=True)
    print(f"new shared memory, written by one thread and nothing else: {limit:.2f} GB/s before, "
          f"{memory_limit():.2f} after")


if __name__ == "__main__":
    main()
