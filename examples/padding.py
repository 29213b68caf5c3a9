"""Why prompts are padded on the left: the same three prompts, padded right, padded left, and alone.

    python examples/padding.py

A batch is continued from the logits of its last column. Padded on the right, that column holds a
pad for every prompt but the longest, and the model continues the pad (transformers, float32, masks
and all). Padded on the left, with positions counted from each prompt's own length, it holds each
prompt's last token, and rollpack gives the tokens and logprobs of the prompt alone, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

import numpy as np
import rollpack
import tokenizers
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPTS = (
    "The capital of France is",
    "Water is made of two elements, hydrogen and",
    "Here is how to count to ten in English, one number after the other: one, two, three,",
)
NUM_TOKENS = 8
GREEDY = {"temperature": 0.0, "response_length": NUM_TOKENS, "ignore_eos": True}


def continue_right_padded(folder: pathlib.Path, prompts: list[list[int]]) -> list[list[int]]:
    """Continues a right-padded batch greedily, from the logits of its last column."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [model.config.pad_token_id] * (width - len(prompt))
                        for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids[:, width:].tolist()


def same_bits(first: rollpack.Sample, second: rollpack.Sample) -> bool:
    """Says whether two samples have the same tokens and the same bits in every logprob."""
    return (np.array_equal(first.response_ids, second.response_ids)
            and first.rollout_log_probs.tobytes() == second.rollout_log_probs.tobytes())


def main() -> int:
    """Prints the table. Returns: 0 when the left-padded rows equal the prompts alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=pathlib.Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "models" / "smollm2-135m")
    args = parser.parse_args()

    tokenizer = tokenizers.Tokenizer.from_file(str(args.model / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    right = continue_right_padded(args.model, prompts)
    overrides = {"model.path": args.model.resolve(), "engine.batching": "left_padded"}
    os.chdir(ROOT)  # where launch() looks for build/rollout/rollpack
    with rollpack.launch(args.config, set=overrides) as client:
        left = client.generate(prompts, n=1, sampling=GREEDY)
        alone = [client.generate([ids], n=1, sampling=GREEDY)[0] for ids in prompts]

    longest, equal = max(map(len, prompts)), []
    for index, text in enumerate(PROMPTS):
        equal.append(same_bits(left[index], alone[index]))
        pads = longest - len(prompts[index])
        print(f"\n{text!r}  ({len(prompts[index])} tokens, {pads} pads)")
        for name, ids in (("right-padded", right[index]), ("left-padded", left[index].response_ids),
                          ("alone", alone[index].response_ids)):
            print(f"  {name:13} {tokenizer.decode(list(ids), skip_special_tokens=False)!r}")
        print("  left-padded and alone:",
              "the same tokens, the same logprob bits" if equal[-1] else "DIFFERENT")
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
