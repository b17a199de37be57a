"""Train the authors' shadow-peft with the settings of a run of ours, and evaluate the result, attached and detached.

    python benchmarks/train_shadow_peft.py configs/clinc150.yaml data.validation=null output=runs/shadow-peft

Model, examples, batches, steps, optimizer, seed, rank and update width are those of the settings. alpha, dropout and
the weight of the shadow's loss are shadow-peft's own defaults, unless ``--ours`` takes them from the settings. It is
trained with its own loss and saved by its own ``save_pretrained``. Our loader then opens it; tests show that the logits
are equal.
"""

import argparse
import json
from pathlib import Path

import shadow_peft
from transformers import set_seed

from shadowtune import ShadowForCausalLM
from shadowtune.cli.command import print_table
from shadowtune.config.loading import load_config
from shadowtune.config.training import TrainConfig
from shadowtune.evaluation.run import FinishedRun
from shadowtune.model.methods import load_base, trainable_parameters
from shadowtune.model.objective import own_causal_objective
from shadowtune.models import resolve
from shadowtune.training.trainer import ShadowTrainer, training_arguments, with_row_numbers
from shadowtune.training.training_data import load_training_data


def main() -> None:
    """Train, save, open, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--ours", action="store_true", help="alpha, dropout and lambda of the settings")
    parser.add_argument("--limit", type=int, help="test rows")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = load_config(TrainConfig, arguments.config, arguments.overrides)
    rows = load_training_data(config)
    set_seed(config.seed)
    ours = config.shadow
    settings = {"injection_hidden_size": ours.rank, "gate_hidden_size": ours.update_width}
    weight = {}
    if arguments.ours:
        settings |= {"alpha": ours.alpha, "dropout": ours.dropout}
        weight = {"shadow_loss_weight": ours.shadow_loss_weight}
    base = load_base(config.model)
    baseline = shadow_peft.ShadowForCausalLM(
        shadow_peft.get_shadow_model(base, shadow_peft.ShadowConfig(**settings)), **weight
    )
    output = Path(config.output)
    trainer = ShadowTrainer(
        model=baseline,
        args=training_arguments(config, output / "checkpoints", quiet=True),
        train_dataset=rows.train,
        data_collator=with_row_numbers(rows.collate),
        processing_class=rows.tokenizer,
        objective=own_causal_objective,
    )
    trainer.args.save_strategy = "no"
    trainer.train()
    baseline.save_pretrained(output / "model")
    model = ShadowForCausalLM.from_pretrained(output / "model", base=resolve(config.model))
    finished = FinishedRun(output, config, model, rows.tokenizer)
    attached = finished.evaluate("attached", limit=arguments.limit)
    detached = finished.evaluate("detached", limit=arguments.limit, compare_with=attached.answers)
    table = [
        {
            "method": f"shadow-peft, {mode}",
            "accuracy": result.accuracy,
            "accuracy_low": result.accuracy_low,
            "accuracy_high": result.accuracy_high,
            "agreement": result.agreement,
            "trained": trainable_parameters(baseline),
            "seconds": trainer.progress().seconds,
        }
        for mode, result in (("attached", attached), ("detached", detached))
    ]
    print_table(f"{arguments.config}: {' '.join(arguments.overrides)}", table)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
