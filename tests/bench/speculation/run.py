"""What drafts gain and cost: one workload with speculation off and on, in turn, as a table.

Without --workload the texts of texts.jsonl are continued greedily, which is where drafts come true.

    .venv/bin/python tests/bench/speculation/run.py
    .venv/bin/python tests/bench/speculation/run.py --model MODEL --workload long_tail.jsonl \\
        --temperature 1 --max-num-seqs 256
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[3]
BINARY = os.environ.get("ROLLPACK_BINARY", ROOT / "build/rollout/rollpack")
MODEL = os.environ.get("ROLLPACK_MODEL", ROOT / "models/smollm2-135m")
COLUMNS = ("sequences at once", "speculation", "tokens/s", "gain", "tokens a step",
           "drafts a step", "drafted", "accepted")


def encode_texts(model: str, response_tokens: int) -> list[dict[str, Any]]:
    """Returns a workload: every text of texts.jsonl as one prompt with one sample."""
    from transformers import AutoTokenizer  # noqa: PLC0415: only this workload needs it

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = (pathlib.Path(__file__).parent / "texts.jsonl").read_text("utf-8").splitlines()
    return [{"input_ids": tokenizer(json.loads(line)["text"])["input_ids"],
             "response_tokens": [response_tokens]} for line in lines]


def run_bench(arguments: argparse.Namespace, workload: pathlib.Path, max_num_seqs: int,
              speculation: str) -> dict[str, Any]:
    """Returns what `rollpack bench` reports of its fastest pass."""
    settings = {
        "model.path": arguments.model, "rollout.temperature": arguments.temperature,
        "engine.max_num_seqs": max_num_seqs, "engine.speculation": speculation,
        "engine.num_threads": arguments.num_threads}
    command = [BINARY, "bench", "--config", ROOT / "configs/default.yaml", "--workload", workload,
               "--repeat", arguments.repeat]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def table_row(max_num_seqs: int, speculation: str, runs: list[dict[str, Any]],
              base: list[dict[str, Any]]) -> str:
    """Returns a line of the table; the gain is the median over runs next to each other."""
    counters = runs[-1]["counters"]
    num_drafts = max(1, counters["num_drafts"])
    gain = statistics.median(run["response_tokens_per_s"] / off["response_tokens_per_s"]
                             for run, off in zip(runs, base, strict=True))
    cells = (
        max_num_seqs, speculation,
        f"{statistics.median(run['response_tokens_per_s'] for run in runs):.1f}", f"{gain:.3f}",
        f"{counters['num_tokens_generated'] / counters['num_steps']:.2f}",
        f"{counters['num_drafts'] / counters['num_steps']:.3f}",
        f"{counters['num_draft_tokens'] / num_drafts:.2f}",
        f"{counters['num_accepted_tokens'] / num_drafts:.2f}")
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--workload", type=pathlib.Path)
    parser.add_argument("--response-tokens", type=int, default=200, help="of each text")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-num-seqs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--speculation", nargs="+", default=["auto"], choices=["auto", "on"])
    parser.add_argument("--num-threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--repeat", type=int, default=3, help="passes of a run, the best counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workload = arguments.workload
        if workload is None:
            groups = encode_texts(arguments.model, arguments.response_tokens)
            workload = pathlib.Path(folder) / "texts.jsonl"
            workload.write_text("".join(json.dumps(group) + "\n" for group in groups), "utf-8")
        print("| " + " | ".join(COLUMNS) + " |")
        print("|" + "---|" * len(COLUMNS))
        for max_num_seqs in arguments.max_num_seqs:
            runs: dict[str, list[dict[str, Any]]] = {
                name: [] for name in ["off", *arguments.speculation]}
            for _ in range(arguments.rounds):
                for name, results in runs.items():
                    results.append(run_bench(arguments, workload, max_num_seqs, name))
            for name, results in runs.items():
                print(table_row(max_num_seqs, name, results, runs["off"]), flush=True)


if __name__ == "__main__":
    main()
