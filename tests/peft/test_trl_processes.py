"""TRL's trainers in two processes: the base is the reference without a copy, and GRPO's head under FSDP2."""

import os

import accelerate.state
import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from shadowtune import ShadowConfig, ShadowForCausalLM
from tests.peft.test_trl import DATA, quiet, reward_even
from tests.support.bases import tiny_base
from tests.support.processes import run_processes
from tests.support.tokenizers import tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of TRL, about its own defaults
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "ACCELERATE_USE_CPU": "true",
}


def allow_fsdp_on_cpus():
    """Let accelerate use FSDP, which it does not on processors, in this process."""
    original = accelerate.state.AcceleratorState.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = kwargs.get("fsdp_plugin") or FullyShardedDataParallelPlugin()

    accelerate.state.AcceleratorState.__init__ = init


def learn(kind, path, batch):
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded:
        allow_fsdp_on_cpus()
    settings = {"per_device_train_batch_size": batch, "gradient_checkpointing": False, "logging_steps": 1}
    torch.manual_seed(1)
    config = ShadowConfig(rank=4, update_width=3, dropout=0.0, shadow_loss_weight=0.5)
    model = ShadowForCausalLM.from_base(tiny_base(), config)
    with torch.no_grad():
        model.shadow.boundaries.injection_ups.normal_(std=0.1)
    given = {"train_dataset": Dataset.from_list(DATA[kind]), "processing_class": tiny_tokenizer()}
    if kind == "dpo":
        args = quiet(DPOConfig, path, use_cpu=not sharded, **settings)
        trainer = DPOTrainer(model, ref_model=model.reference(), args=args, **given)
        assert not list(trainer.ref_model.parameters())
    else:
        settings |= {"num_generations": 2, "max_completion_length": 6, "beta": 0.0}
        trainer = GRPOTrainer(
            model, reward_even, args=quiet(GRPOConfig, path, use_cpu=not sharded, **settings), **given
        )
    assert (trainer.accelerator.distributed_type is DistributedType.FSDP) == sharded
    trainer.train()
    parameters = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    weights = {name: p.full_tensor() if sharded else p.clone() for name, p in parameters.items()}
    return [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line], weights


def compare(expected, found):
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["DDP", "FSDP2"])
def test_dpo_with_the_base_as_its_reference_gives_the_result_of_one_process(environment, tmp_path):
    (one,) = run_processes(learn, 1, tmp_path / "1", "dpo", tmp_path, 4)
    for each in run_processes(learn, 2, tmp_path / "2", "dpo", tmp_path, 2, **environment):
        compare(one, each)


def test_grpo_under_fsdp2_gives_the_result_of_ddp(tmp_path):
    """Generation draws per process, so one process has other answers."""
    expected = run_processes(learn, 2, tmp_path / "1", "grpo", tmp_path, 2)
    found = run_processes(learn, 2, tmp_path / "2", "grpo", tmp_path, 2, **FSDP2)
    for one, other in zip(expected, found, strict=True):
        compare(one, other)
