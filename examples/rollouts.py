"""Samples from SmolLM2 as NumPy and torch views, and one weight update: python examples/rollouts.py

Wants models/smollm2-135m (examples/export_smollm2.py) and `pip install ./trainer_bridge/python`.
"""

import rollpack
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = "models/smollm2-135m"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
prompts = [tokenizer(text).input_ids for text in ("The sky is", "One, two,", "Paris is")]

with rollpack.launch("configs/quickstart.yaml") as engine:
    for version in (1, 2):
        engine.submit(prompts, n=4)
        num_groups = 0
        while num_groups < len(prompts):
            with engine.next_batch() as batch:  # released at the end of the block
                num_groups += batch.num_groups
                ids, log_probs = batch["input_ids"], batch.torch("rollout_log_probs")
                mean = log_probs[batch.torch("loss_mask").bool()].mean()
                print(f"{batch}: {len(ids)} tokens, mean logprob {mean:.3f}")
                for sample in batch.samples():
                    print("  ", repr(tokenizer.decode(sample.response_ids)))
                del ids, log_probs, sample  # a view that lives keeps its slot
        engine.update_weights(model.state_dict(), version)  # here: what an optimizer step left
        print("weights are now version", engine.get_weight_version())
