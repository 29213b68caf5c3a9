"""vLLM on the CPU: compiled, prefix cache, bf16, logprobs of sampled tokens.

Called as `run_vllm.py --model FOLDER --workload FILE`; FOLDER is the Hugging Face one.
"""

from __future__ import annotations

import os
import time

from workload import Sample, arguments, report


def main() -> None:
    args = arguments(__doc__)
    # Read when vllm is imported.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{args.threads - 1}")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: no IPC to time
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import vllm

    engine = vllm.LLM(model=args.model, dtype="bfloat16", skip_tokenizer_init=True,
                      max_model_len=2048, max_num_seqs=128, enable_prefix_caching=True,
                      disable_log_stats=True)

    def run(samples: list[Sample]) -> tuple[float, int]:
        # A seed of its own for each request is refused on the CPU.
        params = [vllm.SamplingParams(temperature=1.0, max_tokens=s.response_tokens,
                                      ignore_eos=True, logprobs=0, detokenize=False)
                  for s in samples]
        prompts = [{"prompt_token_ids": s.prompt_ids} for s in samples]
        start = time.perf_counter()
        results = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return seconds, sum(len(r.outputs[0].token_ids) for r in results)

    report(f"vLLM {vllm.__version__} CPU", args, run)


if __name__ == "__main__":
    main()
