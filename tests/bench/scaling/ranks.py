"""A whole workload on one thread, two threads and two ranks, in turn: ranks.py ROLLPACK MODEL.

16 groups of 8 equal samples, so that two ranks have 64 rows each. Three rounds, medians; each run
reports its best of two passes. Called by run.sh.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

NUM_ROUNDS = 3
GROUPS, SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS = 16, 8, 64, 32
# ranks, threads of each, share_weights
SETTINGS = [(1, 1, "off"), (1, 2, "off"), (2, 1, "off"), (2, 1, "on")]


def run(program: str, model: str, workload: str, setting: tuple[int, int, str]) -> dict[str, Any]:
    """Runs `rollpack bench`. Returns: its report. Raises: SystemExit with its log."""
    ranks, threads, share = setting
    command = ["mpirun", "-n", str(ranks), "--bind-to", "none", "--oversubscribe", program, "bench",
               "--config", "configs/default.yaml", "--workload", workload, "--repeat", "2"]
    for item in (f"model.path={model}", f"engine.num_threads={threads}",
                 f"engine.share_weights={share}"):
        command += ["--set", item]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1",
                   "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"ranks.py: {' '.join(command)}: exit status {done.returncode}\n"
                         f"{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: ranks.py ROLLPACK MODEL")
    walls_s: list[list[float]] = [[] for _ in SETTINGS]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as workload:
        group = {"prompt_tokens": PROMPT_TOKENS, "response_tokens": [RESPONSE_TOKENS] * SAMPLES}
        workload.write((json.dumps(group) + "\n") * GROUPS)
        workload.flush()
        for _ in range(NUM_ROUNDS):
            for setting, walls in zip(SETTINGS, walls_s, strict=True):
                walls.append(run(sys.argv[1], sys.argv[2], workload.name, setting)["wall_s"])
    medians = [statistics.median(walls) for walls in walls_s]
    two_threads = medians[SETTINGS.index((1, 2, "off"))]
    print(f"\nranks: {GROUPS} groups of {SAMPLES}, {PROMPT_TOKENS} prompt and {RESPONSE_TOKENS} "
          f"response tokens; medians of {NUM_ROUNDS} rounds\n"
          f"{'ranks':>6} {'threads':>8} {'weights':>8} {'seconds':>9} {'gain':>6} "
          f"{'over 1 rank, 2 threads':>23}")
    for (ranks, threads, share), seconds in zip(SETTINGS, medians, strict=True):
        weights = "shared" if share == "on" else "private"
        print(f"{ranks:>6} {threads:>8} {weights:>8} {seconds:>9.2f} {medians[0] / seconds:>6.2f} "
              f"{100 * (seconds / two_threads - 1):>+21.1f} %")


if __name__ == "__main__":
    main()
