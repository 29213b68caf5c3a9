"""Runs rollpack and its peers in turn on one workload and prints the table of the README.

A round starts every engine once, one after the other, each in a process of its own that makes one
cold and then warm passes. First passes are compared with first passes and best warm passes with
best warm passes, within a round, so that a machine that slows down for a minute spoils one round
at most; the table has medians over the rounds. A peer that is not installed or breaks keeps its
line, without numbers. Called by ../peers.sh.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SCRIPTS = {"openvino": "run_openvino.py", "vllm": "run_vllm.py", "llamacpp": "run_llamacpp.py"}
MODELS = {"openvino": "{shape}-openvino", "vllm": "{shape}", "llamacpp": "{shape}.gguf"}
NAMES = {"openvino": "OpenVINO GenAI", "vllm": "vLLM CPU", "llamacpp": "llama.cpp"}
LIMIT_S = 3600  # of one process; the slowest peer takes 120 s a pass


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one process: its first pass and the best of the later ones."""

    first_s: float
    warm_s: float


def command_of(engine: str, args: argparse.Namespace) -> list[str]:
    """Returns the command that makes one process of an engine."""
    folder, shape = pathlib.Path(args.peers_dir), args.shape
    if engine == "rollpack":
        overrides = [f"model.path={folder / 'models' / shape}",
                     f"engine.num_threads={args.threads}", *args.set]
        return [args.rollpack, "bench", "--config", str(ROOT / "configs/default.yaml"),
                *(word for override in overrides for word in ("--set", override)),
                "--workload", args.workload, "--repeat", str(args.passes)]
    model = folder / "models" / MODELS[engine].format(shape=shape)
    return [str(folder / engine / "bin/python"), str(HERE / SCRIPTS[engine]), "--model", str(model),
            "--workload", args.workload, "--passes", str(args.passes),
            "--threads", str(args.threads)]


def run(engine: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """Runs one process.

    Returns: the JSON of its last line, or None where a peer broke; its log is on stderr then.
    Raises: SystemExit where rollpack broke.
    """
    try:
        done = subprocess.run(command_of(engine, args), capture_output=True, text=True,
                              check=False, timeout=LIMIT_S)
        status, log = f"exit status {done.returncode}", done.stdout[-2000:] + done.stderr[-4000:]
    except (OSError, subprocess.TimeoutExpired) as error:
        done, status, log = None, str(error), ""
    lines = [] if done is None else [line for line in done.stdout.splitlines() if line[:1] == "{"]
    if done is None or done.returncode != 0 or not lines:
        print(f"compare.py: {engine}: {status}\n{log}", file=sys.stderr, flush=True)
        if engine == "rollpack":
            raise SystemExit(1)
        return None
    report = json.loads(lines[-1])
    report.setdefault("engine", engine)
    passes = " ".join(f"{s:.2f}" for s in report["passes_s"])
    print(f"{report['engine']}: {passes} s", file=sys.stderr, flush=True)
    return report


def timing(report: dict[str, Any]) -> Timing:
    """Returns the two times of a process."""
    return Timing(report["passes_s"][0], min(report["passes_s"][1:]))


def ratios(times: list[Timing], ours: list[Timing]) -> str:
    """Returns how many times faster rollpack is in a round, first and warm, in the median."""
    first = [t.first_s / o.first_s for t, o in zip(times, ours, strict=True)]
    warm = [t.warm_s / o.warm_s for t, o in zip(times, ours, strict=True)]
    return f"{statistics.median(first):.2f} / {statistics.median(warm):.2f}"


def table(rounds: list[dict[str, dict[str, Any] | None]], missing: list[str]) -> str:
    """Formats the rounds, each a report an engine, as a Markdown table."""
    ours = [r["rollpack"] for r in rounds]
    # What the workload takes at least, at the best limits that any round measured.
    flops = ours[0]["roofline_share"] * ours[0]["peak_flops"] * ours[0]["wall_s"]
    peak = max(report["peak_flops"] for report in ours)
    bandwidth = max(report["read_bandwidth_bytes_per_s"] for report in ours)
    by_steps_s = min(report["step_roofline_share"] * report["wall_s"] for report in ours)
    tokens = ours[0]["response_tokens"]
    own = [timing(report) for report in ours]
    lines = ["| engine | first pass, tokens/s | warm pass, tokens/s | share of the limit "
             "| rollpack is faster by, first / warm |", "|---|---|---|---|---|"]
    for engine in rounds[0]:
        reports = [r[engine] for r in rounds]
        if None in reports:
            missing = [*missing, engine]
            continue
        times = [timing(report) for report in reports]
        first = statistics.median(t.first_s for t in times)
        warm = statistics.median(t.warm_s for t in times)
        lines.append(f"| {reports[0]['engine']} | {tokens / first:.0f} | {tokens / warm:.0f}"
                     f" | {100 * flops / peak / warm:.0f} % "
                     f"| {ratios(times, own) if engine != 'rollpack' else '1'} |")
    lines += [f"| {NAMES[engine]} | not measured | not measured | | |" for engine in missing]
    lines.append(f"| limit: the workload's FLOP at {peak / 1e9:.0f} GFLOP/s | "
                 f"| {tokens * peak / flops:.0f} | 100 % | |")
    lines.append(f"| limit of rollpack's steps, reading at {bandwidth / 1e9:.0f} GB/s besides | "
                 f"| {tokens / by_steps_s:.0f} | {100 * flops / peak / by_steps_s:.0f} % | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peers", nargs="*", choices=[*SCRIPTS, []], help="peers to run")
    parser.add_argument("--peers-dir", required=True, help="environments and models of peers.sh")
    parser.add_argument("--rollpack", required=True, help="the program")
    parser.add_argument("--workload", required=True)
    parser.add_argument("--shape", default="qwen2.5-0.5b", help="of the model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=3, help="of a process, cold first; 2 or more")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="section.key=value of rollpack")
    parser.add_argument("--missing", action="append", default=[], choices=SCRIPTS,
                        help="peer that could not be installed")
    parser.add_argument("--json", help="file for the reports of all processes")
    args = parser.parse_args()
    if args.passes < 2:
        parser.error(f"--passes {args.passes}: expected 2 or more, a cold and a warm one")
    rounds = []
    for number in range(1, args.rounds + 1):
        print(f"round {number} of {args.rounds}", file=sys.stderr, flush=True)
        rounds.append({engine: run(engine, args) for engine in ["rollpack", *args.peers]})
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(rounds, indent=1), encoding="utf-8")
    workload = pathlib.Path(args.workload).stem
    print(f"`{workload}`, random {args.shape} weights, bf16, {args.threads} threads, "
          f"medians of {args.rounds} rounds:\n\n{table(rounds, args.missing)}")


if __name__ == "__main__":
    main()
