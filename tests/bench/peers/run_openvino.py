"""OpenVINO GenAI: continuous batching, prefix cache, bf16 computation, logprobs of sampled tokens.

Called as `run_openvino.py --model FOLDER --workload FILE`; FOLDER is what optimum-cli exported.
"""

from __future__ import annotations

import time

import numpy as np
import openvino
import openvino_genai as genai
from workload import Sample, arguments, report


def main() -> None:
    args = arguments(__doc__)
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 4  # GB
    scheduler.max_num_batched_tokens = 2048
    scheduler.max_num_seqs = 128
    scheduler.enable_prefix_caching = True
    scheduler.dynamic_split_fuse = True  # its chunked prefill
    pipeline = genai.ContinuousBatchingPipeline(
        args.model, scheduler_config=scheduler, device="CPU",
        properties={"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16",
                    "INFERENCE_NUM_THREADS": args.threads})

    def run(samples: list[Sample]) -> tuple[float, int]:
        ids = [openvino.Tensor(np.array([s.prompt_ids], dtype=np.int64)) for s in samples]
        configs = []
        for index, sample in enumerate(samples):
            config = genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos = sample.response_tokens, True
            config.do_sample, config.temperature, config.top_p = True, 1.0, 1.0
            config.top_k = 10**9  # off
            config.rng_seed, config.logprobs = index, 1
            configs.append(config)
        start = time.perf_counter()
        results = pipeline.generate(ids, configs)
        seconds = time.perf_counter() - start
        return seconds, sum(len(r.m_generation_ids[0]) for r in results)

    report(f"OpenVINO GenAI {genai.__version__.split('-')[0]}", args, run)


if __name__ == "__main__":
    main()
