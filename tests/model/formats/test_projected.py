import pytest
import shadow_peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.formats.conversion import convert
from shadowtune.model.formats.projected import read_projected
from tests.model.formats.third_party import CLOSE, batch
from tests.support.bases import fill, tiny_base


@pytest.fixture(params=["llama", "gpt2", "qwen3"])
def projected(request, tmp_path):
    sizes = {"n_embd": 16} if request.param == "gpt2" else {"hidden_size": 16}
    small = tiny_base(request.param, seed=5, **sizes)
    model = shadow_peft.AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=small,
        shadow_hidden_projection=torch.nn.Linear(16, 32, bias=False),
        lm_head=torch.nn.Linear(32, small.config.vocab_size, bias=False),
        init_optimal_projection=False,
    ).eval()
    fill(model, seed=9)
    model.save_pretrained(tmp_path / "projected")
    return str(tmp_path / "projected")


@torch.no_grad()
def test_the_plain_model_has_their_logits(projected, tmp_path):
    theirs = shadow_peft.AutoModelForCausalLMWithHiddenProjection.from_pretrained(projected).eval()
    convert(projected, tmp_path / "plain", "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    expected = theirs(**batch()).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(plain(**batch()).logits, expected, **CLOSE)


def test_its_parts_are_those_of_the_file(projected):
    parts, file = read_projected(projected), load_file(f"{projected}/model.safetensors")
    assert torch.equal(parts.projection, file["shadow_hidden_projection.weight"])
    assert parts.backbone_config.hidden_size == 16
    assert {"norm.weight", "ln_f.weight"} & parts.backbone_state.keys()
    assert torch.equal(parts.embedding.weight, next(t for n, t in file.items() if "embed_tokens" in n or "wte" in n))


def test_it_is_no_adapter(projected, tmp_path):
    with pytest.raises(CheckpointError, match="--format plain"):
        ShadowForCausalLM.from_pretrained(projected, base=tiny_base())
    with pytest.raises(ConfigError, match="--format plain"):
        convert(projected, tmp_path / "out", "peft")


def test_damage_is_named(projected, tmp_path):
    file = f"{projected}/model.safetensors"
    tensors = load_file(file)
    for lost in ("shadow_hidden_projection.weight", next(name for name in tensors if name.endswith("weight"))):
        save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file)
        with pytest.raises(CheckpointError, match=lost.removeprefix("shadow_model.")):
            convert(projected, tmp_path / "out", "plain")


def test_one_without_a_head_of_its_own_is_a_backbone_and_no_model(projected, tmp_path):
    """PEFT writes such: the head is the base's."""
    base, file = tiny_base("llama"), f"{projected}/model.safetensors"
    if "gpt2" in read_projected(projected).backbone_config.model_type:
        base = tiny_base("gpt2")
    whole = ShadowForCausalLM.from_base(base, ShadowConfig(backbone=projected, rank=2))
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, file)
    without = ShadowForCausalLM.from_base(base, ShadowConfig(backbone=projected, rank=2))
    for mode in ("attached", "detached"):
        logits = [model.set_mode(mode).eval()(**batch()).logits for model in (whole, without)]
        assert torch.equal(*logits)
    with pytest.raises(CheckpointError, match=r"no lm_head\.weight.*backbone: "):
        convert(projected, tmp_path / "out", "plain")
