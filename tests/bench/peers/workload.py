"""A workload file as a peer reads it, and the lines in which every peer reports."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Sample:
    """One response to compute: its group, prompt ids, and length in tokens."""

    group: int
    prompt_ids: list[int]
    response_tokens: int


def load(path: str, seed: int) -> list[Sample]:
    """Reads a workload. Prompts that only have a length get ids drawn from `seed`.

    Ids start at 1000, past the special tokens of every tokenizer used here.
    """
    draw = random.Random(seed)
    samples = []
    with open(path, encoding="utf-8") as lines:
        for group, line in enumerate(lines):
            item = json.loads(line)
            ids = item.get("input_ids") or [
                draw.randrange(1000, 40000) for _ in range(item["prompt_tokens"])]
            samples += [Sample(group, ids, length) for length in item["response_tokens"]]
    return samples


def arguments(description: str) -> argparse.Namespace:
    """Parses what every peer is called with: --model, --workload, --passes, --threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="the model in this peer's own format")
    parser.add_argument("--workload", required=True, help="JSONL of lengths")
    parser.add_argument("--passes", type=int, default=3, help="timed passes, cold first")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def report(engine: str, args: argparse.Namespace,
           run: Callable[[list[Sample]], tuple[float, int]]) -> None:
    """Warms the engine up, times the passes and prints one JSON line.

    What is compiled at first use is not held against a peer. The warm-up and every pass have
    prompts of their own: siblings share a prompt in the peer's prefix cache, passes do not, and
    each computes all of the workload, as rollpack's do.

    Args:
        engine: name and version.
        args: of `arguments()`.
        run: takes samples, returns seconds and the number of response tokens.

    Raises:
        SystemExit: a pass gave another number of tokens than the workload asks for.
    """
    run([dataclasses.replace(s, response_tokens=min(s.response_tokens, 8))
         for s in load(args.workload, seed=args.passes)[:16]])
    passes_s = []
    for number in range(args.passes):
        samples = load(args.workload, seed=number)
        wanted = sum(s.response_tokens for s in samples)
        seconds, tokens = run(samples)
        if tokens != wanted:
            raise SystemExit(f"{engine}: {tokens} response tokens, the workload has {wanted}")
        passes_s.append(seconds)
    print(json.dumps({"engine": engine, "passes_s": passes_s, "response_tokens": wanted}),
          flush=True)
