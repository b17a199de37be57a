"""Bases of which ``device_map`` puts parts on the disk: their weights are on "meta" between the calls."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.errors import ShadowtuneError
from tests.support.runs import model_directory
from tests.support.shadows import perturb, tokens

PARTS = (
    "model.embed_tokens",
    *(f"model.layers.{block}" for block in range(4)),
    "model.norm",
    "model.rotary_emb",
    "lm_head",
)


@pytest.mark.parametrize(
    "offloaded", [["lm_head"], ["model.embed_tokens"], ["model.layers.0", "model.layers.2", "lm_head"]]
)
def test_an_offloaded_part_changes_neither_outputs_nor_gradients(offloaded, tmp_path):
    directory = model_directory(tmp_path / "base")
    whole = perturb(ShadowForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(directory), ShadowConfig(rank=4)))
    whole.save_pretrained(tmp_path / "shadow")
    places = {part: "disk" if part in offloaded else "cpu" for part in PARTS}
    base = AutoModelForCausalLM.from_pretrained(directory, device_map=places, offload_folder=str(tmp_path / "disk"))
    model = ShadowForCausalLM.from_pretrained(tmp_path / "shadow", base=base)
    ids, results = tokens(2, 7), []
    for each in (whole.eval(), model):
        loss = each(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in each.shadow.named_parameters() if p.grad is not None}
        results.append((loss.detach(), each(input_ids=ids).logits, gradients))
    torch.testing.assert_close(results[1], results[0])
    new = ShadowForCausalLM.from_base(base, ShadowConfig(rank=4, channel_scaling=True)).eval()
    assert new.generate(ids, max_new_tokens=2, speculate=True).shape == (2, 9)


@pytest.mark.parametrize("part", ["lm_head", "model.embed_tokens"])
def test_the_detached_model_needs_embedding_and_head_in_memory(part, tmp_path):
    directory = model_directory(tmp_path / "base")
    places = {name: "disk" if name == part else "cpu" for name in PARTS}
    base = AutoModelForCausalLM.from_pretrained(directory, device_map=places, offload_folder=str(tmp_path / "disk"))
    with pytest.raises(ShadowtuneError, match="offloaded"):
        ShadowForCausalLM.from_base(base, ShadowConfig(rank=4)).detached()
