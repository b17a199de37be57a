import pytest
import torch
from transformers import Trainer

from shadowtune import ShadowConfig
from shadowtune.data.collate import CausalCollator
from shadowtune.errors import ConfigError
from shadowtune.training.stages import (
    DraftHeadStage,
    JointStage,
    LogitInterpolationStage,
    ShadowOnlyStage,
    StageContext,
    draft_head_only,
    shadow_only,
    stages,
)
from tests.support.runs import arguments, causal_rows, run_config, snapshot, trainer_of
from tests.support.shadows import perturbed_model
from tests.support.tokenizers import tiny_tokenizer


def plain_trainer(model, path, **settings):
    """A trainer of transformers, which knows nothing of shadows."""

    def collate(examples):
        return CausalCollator(0)(examples)

    return Trainer(
        model=model,
        args=arguments(path, max_steps=3, **settings),
        train_dataset=causal_rows(),
        eval_dataset=causal_rows(4),
        data_collator=collate,
        processing_class=tiny_tokenizer(),
    )


def moved(before, after):
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("kind", ["transformers", "shadowtune"])
def test_stages_run_with_any_trainer_and_train_their_part_alone(kind, tmp_path):
    model = perturbed_model(draft_rank=4, shadow_loss_weight=0.5)
    if kind == "transformers":
        trainer = plain_trainer(model, tmp_path)
    else:
        trainer = trainer_of(model, arguments(tmp_path, max_steps=3), causal_rows(), collate=CausalCollator(0))
        trainer.eval_dataset, trainer.processing_class = causal_rows(4), tiny_tokenizer()
    context = StageContext.from_trainer(trainer)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = {
        ShadowOnlyStage(): ("shadow.backbone.",),
        JointStage(): ("shadow.",),
        LogitInterpolationStage(): (),
        DraftHeadStage(0.5): ("shadow.draft_head.",),
    }
    entries = {}
    for stage, prefixes in parts.items():
        before = snapshot(model)
        entries |= stage.run(context)
        changed = moved(before, snapshot(model))
        assert bool(changed) == bool(prefixes), stage.name
        assert all(name.startswith(prefixes) for name in changed), stage.name
        assert model.mode == "attached"
        assert trainable == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert entries["steps"] == 3
    assert entries["drafting_seconds"] > 0 and entries["fit_seconds"] > 0


def test_the_shadow_alone_learns_from_the_base_only_if_asked(tmp_path):
    model = perturbed_model(distillation_weight=0.5, shadow_loss_weight=0.5)
    runs = []
    model.architecture.decoder_of(model.base).register_forward_pre_hook(lambda *_: runs.append(1))
    for distillation in (False, True):
        ShadowOnlyStage(distillation).run(StageContext.from_trainer(plain_trainer(model, tmp_path)))
        assert bool(runs) == distillation
        assert model.shadow.config.distillation_weight == 0.5


def test_everything_is_restored_even_if_a_stage_fails():
    model = perturbed_model(draft_rank=4)
    model.shadow.backbone.norm.weight.requires_grad_(False)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    config = model.shadow.config
    for context in (shadow_only(model), draft_head_only(model)):
        with pytest.raises(ZeroDivisionError), context:
            raise ZeroDivisionError
        assert (model.mode, model.shadow.config) == ("attached", config)
        assert trainable == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_a_stage_needs_is_an_error_of_one_line(tmp_path):
    model = perturbed_model()
    context = StageContext(model, causal_rows(), lambda stage, dataset: pytest.fail("trains"))
    with pytest.raises(ConfigError, match="give an eval_dataset"):
        LogitInterpolationStage().run(context)
    with pytest.raises(ConfigError, match="need a tokenizer"):
        DraftHeadStage().run(context)
    context.tokenizer = tiny_tokenizer()
    model.generate = lambda *args, **kwargs: pytest.fail("answers first")
    with pytest.raises(ConfigError, match=r"no draft head; set ShadowConfig\.draft_rank"):
        DraftHeadStage().run(context)


def test_the_settings_say_which_stages_a_run_has(tmp_path):
    config = run_config(tmp_path)
    shadow = ShadowConfig(draft_rank=4)

    def names(**settings):
        return [stage.name for stage in stages(run_config(tmp_path, **settings))]

    data = type(config.data)(train=config.data.train, validation=config.data.train)
    assert names() == names(method="lora") == names(shadow_epochs=2.0) == ["joint"]
    assert names(stage="pretrain") == ["shadow_only"]
    assert names(shadow=shadow, drafting_epochs=1.0, data=data, fit_logit_interpolation=True) == [
        "joint",
        "logit_interpolation",
        "draft_head",
    ]
