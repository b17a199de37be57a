"""Runs models in vLLM, in an interpreter that has it; knows nothing of the tests and imports nothing of ours.

    VLLM_PYTHON worker.py JOBS.json RESULTS.json

Each job is {"model": DIRECTORY, "prompts": [[token ids]], "engine": {arguments of vllm.LLM}, "max_tokens": N}, or has
"classify": true or "dtypes": [names of parameters]. Each result is {"tokens": [[...]]}, {"probabilities": [[...]]},
{"dtypes": [...]} or {"error": "..."}.
"""

import gc
import json
import os
import sys

os.environ.update(
    HF_HUB_OFFLINE="1",
    KMP_BLOCKTIME="0",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
)
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

DEFAULTS = {
    "block_size": 32,  # the smallest on CPUs
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "seed": 0,
    "skip_tokenizer_init": True,
}


def run(job):
    """Return the result of one job."""
    from vllm import LLM, SamplingParams, TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    llm = LLM(job["model"], **{**DEFAULTS, **job.get("engine", {})})
    if job.get("dtypes"):
        return {"dtypes": llm.apply_model(lambda model: [str(model.get_parameter(n).dtype) for n in job["dtypes"]])[0]}
    if job.get("classify"):
        return {"probabilities": [each.outputs.probs for each in llm.classify(prompts, use_tqdm=False)]}
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return {"tokens": [list(each.outputs[0].token_ids) for each in outputs]}


def main():
    """Run all jobs of a file, each whatever becomes of the others."""
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    results = {}
    for name, job in jobs.items():
        try:
            results[name] = run(job)
        except Exception as error:  # vLLM raises what it likes; the test compares the message
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        with open(sys.argv[2], "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main()
