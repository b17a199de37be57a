import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.errors import ConfigError
from shadowtune.training.run import train
from shadowtune.training.stage_settings import draft_head_settings
from shadowtune.training.stages import DraftHeadStage, draft_head_only, own_answers
from tests.support.runs import causal_rows, run_config
from tests.support.shadows import perturbed_model
from tests.support.tokenizers import tiny_tokenizer

SHADOW = {"rank": 4, "update_width": 3, "dropout": 0.0, "draft_rank": 4, "shadow_loss_weight": 0.5}


def saved(run):
    return load_file(Path(run) / "model" / "model.safetensors")


def test_the_drafter_learns_last_and_alone(tmp_path):
    settings = {"shadow": ShadowConfig(**SHADOW), "max_steps": 3}
    plain = run_config(tmp_path, **settings, output=str(tmp_path / "plain"))
    drafted = run_config(tmp_path, **settings, output=str(tmp_path / "drafted"), drafting_epochs=2.0)
    assert train(plain, quiet=True).drafting_seconds is None
    summary = train(drafted, quiet=True)
    assert summary.drafting_seconds > 0
    assert summary.trainable_parameters == sum(
        tensor.numel() for name, tensor in saved(drafted.output).items() if name != "shadow.draft_vocabulary"
    )
    before, after = saved(plain.output), saved(drafted.output)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == ("draft_head" not in name), name
    lines = (Path(drafted.output) / "drafting" / "metrics.jsonl").read_text().splitlines()
    assert "draft_loss" in json.loads(lines[0])
    model = ShadowForCausalLM.from_pretrained(Path(drafted.output) / "model")
    assert model.shadow.draft_head is not None


def test_it_learns_what_the_model_answers():
    model, rows = perturbed_model(draft_rank=4), causal_rows(5)
    own = own_answers(model, tiny_tokenizer(), rows)
    for row, said in zip(rows, own, strict=True):
        begin = next(place for place, label in enumerate(row["labels"]) if place and label != -100)
        assert said["input_ids"][:begin] == row["input_ids"][:begin]
        assert said["labels"][:begin] == [-100] * begin
        assert said["labels"][begin:] == said["input_ids"][begin:]
        prompt = torch.tensor([row["input_ids"][:begin]])
        count = len(said["input_ids"]) - begin
        answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False)
        assert answer[0].tolist() == said["input_ids"]


@pytest.mark.parametrize(("epochs", "count", "passes"), [(0.3, 4, 1), (1.0, 11, 1), (2.5, 11, 2.5)])
def test_less_than_an_epoch_answers_a_part_of_the_prompts(tmp_path, epochs, count, passes):
    config = run_config(tmp_path, shadow=ShadowConfig(**SHADOW), drafting_epochs=epochs, seed=3)
    rows = causal_rows(11)
    stage = DraftHeadStage(config.drafting_epochs, config.seed)
    chosen = stage.choose(rows)
    assert len(chosen) == count and all(row in rows for row in chosen)
    assert chosen == stage.choose(rows)
    assert draft_head_settings(config).epochs == passes


def test_everything_else_is_free_again_even_if_it_fails():
    model = perturbed_model(draft_rank=4)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    context = draft_head_only(model)
    context.__enter__()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in names if "draft_head" in name}
    context.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"drafting_epochs": 1.0}, "set shadow.draft_rank"),
        ({"drafting_epochs": -1.0}, "drafting_epochs must be at least 0"),
        ({"shadow": ShadowConfig(draft_rank=4), "task": "classification"}, "shadow.draft_rank needs task=causal_lm"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        run_config(tmp_path, **settings)


def test_other_methods_have_no_drafter(tmp_path):
    config = run_config(tmp_path, method="lora", drafting_epochs=1.0, max_steps=2)
    assert train(config, quiet=True).drafting_seconds is None
