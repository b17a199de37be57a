"""One model in vLLM, for the benchmark ``vllm``; run by an interpreter that has vLLM.

The first line of standard input is {"model": DIRECTORY, "engine": {arguments of vllm.LLM}, "prompts": [[token ids]],
"new": N}. Each further line is a number of streams: so many prompts are continued at once by N tokens, and a line
{"tokens": all new tokens, "peak_mb": memory since loading} is the reply. Everything else goes to standard error.

The directory of this file is the first that imports are looked up in: no file in it may be called ``vllm.py``.
"""

import json
import os
import sys

os.environ.update(KMP_BLOCKTIME="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def memory_mb(key: str) -> float:
    """Return a value of this process's status, MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 2**10


def main() -> None:
    """Load the model, then answer until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to standard output
    from vllm import LLM, SamplingParams, TokensPrompt

    job = json.loads(sys.stdin.readline())
    llm = LLM(job["model"], **job["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    loaded = memory_mb("VmRSS")
    print(json.dumps({}), file=replies, flush=True)
    for line in sys.stdin:
        outputs = llm.generate(prompts[: int(line)], sampling, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        peak = max(0.0, memory_mb("VmHWM") - loaded)
        print(json.dumps({"tokens": tokens, "peak_mb": peak}), file=replies, flush=True)


if __name__ == "__main__":
    main()
