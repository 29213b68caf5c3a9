"""llama.cpp: one shared batch, a group's prompt prefilled once and forked by sequence ids.

Called as `run_llamacpp.py --model FILE.gguf --workload FILE`. Tokens and logprobs are drawn with
NumPy: llama.cpp's own sampler sorts the vocabulary for every token and is slower.
"""

from __future__ import annotations

import time

import llama_cpp
import numpy as np
from workload import Sample, arguments, report

BATCH_TOKENS = 4096


class Engine:
    """A model and its context; every pass starts with an empty cache."""

    def __init__(self, path: str, num_threads: int) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 65536, 2048, 512, 128
        params.n_threads = params.n_threads_batch = num_threads
        params.kv_unified = True  # sequences share the cells of a common prompt
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.num_vocab = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 128)
        self.random = np.random.default_rng(0)

    def add(self, token: int, position: int, sequences: list[int], wants_logits: bool) -> int:
        """Appends a token to the batch. Returns: its row."""
        row = self.batch.n_tokens
        self.batch.token[row], self.batch.pos[row] = token, position
        self.batch.n_seq_id[row] = len(sequences)
        for i, sequence in enumerate(sequences):
            self.batch.seq_id[row][i] = sequence
        self.batch.logits[row] = int(wants_logits)
        self.batch.n_tokens = row + 1
        return row

    def decode(self) -> None:
        status = llama_cpp.llama_decode(self.context, self.batch)
        if status != 0:
            raise SystemExit(f"llama_decode: status {status}")

    def sample(self, row: int) -> tuple[int, float]:
        """Draws from the softmax of a row. Returns: token, logprob."""
        pointer = llama_cpp.llama_get_logits_ith(self.context, row)
        logits = np.ctypeslib.as_array(pointer, (self.num_vocab,))
        top = logits.max()
        mass = np.cumsum(np.exp(logits - top))
        token = int(np.searchsorted(mass, self.random.random() * mass[-1]))
        token = min(token, self.num_vocab - 1)
        return token, float(logits[token] - top - np.log(mass[-1]))

    def prefill(self, samples: list[Sample]) -> dict[int, int]:
        """Decodes one prompt a group, of at most BATCH_TOKENS together. Returns: group -> row."""
        members: dict[int, list[int]] = {}
        for i, sample in enumerate(samples):
            members.setdefault(sample.group, []).append(i)
        self.batch.n_tokens = 0
        last_row = {}
        for group, sequences in members.items():
            prompt = samples[sequences[0]].prompt_ids
            for position, token in enumerate(prompt):
                is_last = position == len(prompt) - 1
                last_row[group] = self.add(token, position, sequences, is_last)
        self.decode()
        return last_row

    def run(self, samples: list[Sample]) -> tuple[float, int]:
        start = time.perf_counter()
        llama_cpp.llama_memory_clear(self.memory, True)
        last_row = self.prefill(samples)
        tokens = [self.sample(last_row[s.group])[0] for s in samples]
        num_tokens = len(samples)
        step = 1
        while True:
            self.batch.n_tokens = 0
            rows = {i: self.add(tokens[i], len(s.prompt_ids) + step - 1, [i], True)
                    for i, s in enumerate(samples) if step < s.response_tokens}
            if not rows:
                return time.perf_counter() - start, num_tokens
            self.decode()
            for i, row in rows.items():
                tokens[i] = self.sample(row)[0]
            num_tokens += len(rows)
            step += 1


def main() -> None:
    args = arguments(__doc__)
    engine = Engine(args.model, args.threads)
    report(f"llama.cpp (llama-cpp-python {llama_cpp.__version__})", args, engine.run)


if __name__ == "__main__":
    main()
