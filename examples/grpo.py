"""GRPO on SmolLM2-135M, CPU only: rollpack draws the samples, plain PyTorch learns from them.

    python examples/grpo.py                        # starts a server of two ranks by itself
    python examples/grpo.py --socket run/rollpack.sock --task product --steps 40

A step: submit a few questions, take their groups as one packed batch, reward them, train on the
batch as it lies in shared memory, send the new weights. The samples are always on-policy. At the
end out/reward.png shows the reward and out/batch.png one packed batch.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time

import numpy as np
import rollpack
import torch
from rl import pictures
from rl.policy import Policy, group_advantages
from rl.tasks import MAX_RESPONSE_TOKENS, TASKS, ChatFormat, Question, draw, is_right, reward

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_EVALUATED = 128  # questions of a greedy evaluation


def read_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--socket", default=os.environ.get("ROLLPACK_SOCKET"),
                        help="a running server; without it one is started (ROLLPACK_SOCKET)")
    parser.add_argument("--config", default=ROOT / "configs" / "quickstart.yaml",
                        help="of the server that is started")
    parser.add_argument("--ranks", type=int, default=2, help="of the server that is started")
    parser.add_argument("--model", type=pathlib.Path, help="folder; default: the server's")
    parser.add_argument("--task", choices=sorted(TASKS), default="sum")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=4, help="questions a step")
    parser.add_argument("--samples", type=int, default=8, help="samples a question")
    parser.add_argument("--layers", type=int, default=10, help="last layers that learn")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: at least 1 is needed")
    return args


def open_client(args: argparse.Namespace) -> rollpack.Client:
    """Connects to the server that was named, or starts one."""
    if args.socket:
        return rollpack.connect(args.socket)
    overrides = {"model.path": args.model.resolve()} if args.model else {}
    return rollpack.launch(args.config, num_ranks=args.ranks, set=overrides)


def greedy_accuracy(client: rollpack.Client, chat: ChatFormat, questions: list[Question]) -> float:
    """Answers questions at temperature 0. Returns: the share that is right and ended by itself."""
    asked = questions[::-(-len(questions) // MAX_EVALUATED)]
    replies = client.generate(
        [chat.encode(question) for question in asked], n=1,
        sampling={"temperature": 0.0, "response_length": MAX_RESPONSE_TOKENS})
    right = [reply.finish_reason == "stop" and is_right(question, chat.decode(reply.response_ids))
             for question, reply in zip(asked, replies, strict=True)]
    return sum(right) / len(right)


def take_groups(client: rollpack.Client, prompts: list[list[int]], num_samples: int,
                seed: int) -> rollpack.Batch:
    """Draws num_samples responses a prompt. Returns: one packed batch of all groups."""
    client.submit(prompts, n=num_samples, sampling={
        "temperature": 1.0, "response_length": MAX_RESPONSE_TOKENS, "seed": seed})
    batch = client.next_batch(num_groups=len(prompts), timeout_s=600)
    if batch.failed:
        raise batch.failed[0].error
    return batch


def reward_samples(batch: rollpack.Batch, chat: ChatFormat,
                   questions: list[Question]) -> np.ndarray:
    """Returns the reward of each sample, f32 [S]."""
    return np.array([
        reward(questions[sample.prompt_index], chat.decode(sample.response_ids),
               sample.finish_reason == "stop") for sample in batch.samples()], np.float32)


def run_step(client: rollpack.Client, policy: Policy, chat: ChatFormat, args: argparse.Namespace,
             step: int, version: int) -> tuple[float, dict[str, np.ndarray]]:
    """One step; prints its line. Returns: the mean reward and a copy of the batch's columns."""
    questions = draw(TASKS[args.task](), args.prompts, args.seed, step)
    start = time.perf_counter()
    # Prompts come again in later steps; another seed draws other samples for them.
    batch = take_groups(client, [chat.encode(question) for question in questions], args.samples,
                        seed=args.seed * 1_000_003 + step)
    rolled_out = time.perf_counter()
    with batch:
        rewards = reward_samples(batch, chat, questions)
        report = policy.train_step(batch, group_advantages(rewards, batch.prompt_index))
        num_tokens, length = int(batch.response_lens.sum()), float(batch.response_lens.mean())
        columns = {name: batch[name].copy() for name in (
            "segment_ids", "position_ids", "loss_mask", "rollout_log_probs", "cu_seqlens",
            "row_starts")}
    client.report_probs_diff(report.probs_diff)  # among the server's metrics from here on
    trained = time.perf_counter()
    client.update_weights(policy.weights(), version)
    updated = time.perf_counter()
    print(f"step {step:3}  reward {rewards.mean():.3f}  length {length:4.1f}  "
          f"{num_tokens / (rolled_out - start):5.0f} tokens/s  "
          f"rollout {rolled_out - start:.2f} s  training {trained - rolled_out:.2f} s  "
          f"weights {updated - trained:.2f} s  "
          f"rollout_probs_diff_mean {report.probs_diff['training/rollout_probs_diff_mean']:.5f}",
          flush=True)
    return float(rewards.mean()), columns


def main() -> int:
    """Runs the example."""
    args = read_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    with open_client(args) as client:
        folder = args.model or pathlib.Path(client.info.config["model"]["path"])
        torch.manual_seed(args.seed)
        policy, chat = Policy(folder, args.layers, args.learning_rate), ChatFormat(folder)
        # The server may hold the weights of an earlier run.
        version = client.update_weights(policy.weights(), client.get_weight_version() + 1)
        questions = TASKS[args.task]()
        before = greedy_accuracy(client, chat, questions)
        print(f"task {args.task}: greedy accuracy before {before:.1%}", flush=True)
        rewards = []
        for step in range(1, args.steps + 1):
            mean_reward, columns = run_step(client, policy, chat, args, step, version + step)
            rewards.append(mean_reward)
            if step == 1:
                first_batch = columns
        after = greedy_accuracy(client, chat, questions)
    print(f"task {args.task}: greedy accuracy {before:.1%} before, {after:.1%} after; "
          f"mean reward {rewards[0]:.3f} in the first step, {np.mean(rewards[-5:]):.3f} in the last"
          f" {len(rewards[-5:])}")
    pictures.draw_reward(args.out / "reward.png", rewards, (before, after),
                         f"GRPO, task {args.task}, seed {args.seed}")
    pictures.draw_batch(args.out / "batch.png", first_batch)
    print("pictures:", args.out / "reward.png", args.out / "batch.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
