"""Drafts from s0 and what the attached model knew one token earlier."""

import pytest
import torch

from shadowtune import ShadowForCausalLM
from shadowtune.config.shadow import SpeculationConfig
from shadowtune.errors import ConfigError
from shadowtune.model.checkpoint import read_tensors, write_tensors
from shadowtune.model.speculation.drafters import ShadowDrafter
from tests.support.shadows import perturbed_model, tokens


def test_the_draft_loss_changes_neither_network():
    ids = tokens(2, 9)
    grads = {}
    for rank in (None, 4):
        model = perturbed_model(draft_rank=rank, dropout=0.0, shadow_loss_weight=0.5, distillation_weight=0.5).train()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        grads[rank] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if rank is None:
            assert output.draft_loss is None
            plain = output.loss
        else:
            torch.testing.assert_close(output.loss, plain + output.draft_loss)
    draft_head = {name for name in grads[4] if "draft_head" in name}
    assert len(draft_head) == 2
    assert grads[4].keys() - draft_head == grads[None].keys()
    for name, gradient in grads[None].items():
        torch.testing.assert_close(grads[4][name], gradient)


def test_its_features_are_the_inputs_of_the_blocks():
    """Of every block that is named, injections included: the hooks' inputs of the very call."""
    model, ids = perturbed_model(draft_rank=4, draft_layers=(1, -1)), tokens(2, 9)
    seen = {}
    for block in (1, 3):
        module = model.base.model.layers[block]
        module.register_forward_pre_hook(lambda _, args, block=block: seen.update({block: args[0]}))
    with torch.no_grad():
        output = model(ids)
    expected = torch.cat([output.last_hidden_state, seen[1], seen[3]], -1)
    assert torch.equal(output.draft_features, expected)


def test_a_head_without_layers_has_the_tensors_of_earlier_releases():
    names = {name for name in perturbed_model(draft_rank=4).state_dict() if "draft_head" in name}
    assert names == {"shadow.draft_head.down.weight", "shadow.draft_head.up.weight"}


@pytest.mark.parametrize("settings", [{}, {"draft_layers": (1, 2, -1)}], ids=["last", "layers"])
def test_training_makes_it_a_better_drafter_than_the_shadow(settings):
    model = perturbed_model(draft_rank=16, **settings, shadow_loss_weight=0.0, dropout=0.0).train()
    ids = tokens(4, 24, seed=3)
    model.requires_grad_(False)
    model.shadow.draft_head.requires_grad_(True)
    with torch.no_grad():
        said = model.eval()(input_ids=ids).logits.argmax(-1)
    labels = torch.cat([ids[:, :1], said[:, :-1]], 1)  # what the attached model would say next
    optimizer = torch.optim.Adam(model.shadow.draft_head.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        output = model.train()(input_ids=ids, labels=labels)
        output.draft_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.draft_loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"draft_layers": (2, -1)}], ids=["last", "layers"])
def test_it_reads_the_state_that_chose_the_last_token(rows, settings, monkeypatch):
    """Of the first draft: h of the position before; of the others, what was proposed one token earlier."""
    model = perturbed_model(draft_rank=4, **settings)
    ids = tokens(rows, 8)
    seen = []
    propose = ShadowDrafter.propose

    def watched(self, texts, states):
        before = self._context.previous
        proposal = propose(self, texts, states)
        seen.append((before, states, self._context.previous))
        return proposal

    monkeypatch.setattr(ShadowDrafter, "propose", watched)
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids)
    said = model.generate(input_ids=ids, attention_mask=mask, **settings, speculate=2)
    with torch.no_grad():
        h, s = model(said).last_hidden_state, model.encode(said)[1].initial
    torch.testing.assert_close(seen[0][0], h[:, 7], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen[0][1], s[:, 8], atol=1e-4, rtol=1e-4)
    assert seen[1][0] is seen[0][2]
    if rows == 1:  # each round begins behind a state of the text itself
        for before, states, _ in seen[::2]:
            gaps = (h[0] - before).norm(dim=-1)
            place = int(gaps.argmin())
            assert gaps[place] < 1e-3
            torch.testing.assert_close(states[0], s[0, place + 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"draft_layers": (2, -1)}], ids=["last", "layers"])
def test_it_says_the_same_and_is_saved(settings, tmp_path):
    model, ids = perturbed_model(draft_rank=4, **settings), tokens(2, 8)
    model.base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "shadow")
    loaded = ShadowForCausalLM.from_pretrained(tmp_path / "shadow", base=str(tmp_path / "base"))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(**inputs)
    for drafter in ("draft_head", "shadow", "combined"):
        assert torch.equal(plain, loaded.generate(**inputs, speculate=SpeculationConfig(length=3, drafter=drafter)))


def test_layers_that_cannot_be_read_are_errors():
    with pytest.raises(ConfigError, match="draft_rank builds none"):
        perturbed_model(draft_layers=(1,))
    with pytest.raises(ConfigError, match="must be different blocks of the base from 1 to 3"):
        perturbed_model(draft_rank=4, draft_layers=(7,))


def test_a_draft_head_that_was_not_trained_is_refused():
    with pytest.raises(ConfigError, match="needs a shadow that was trained with draft_rank"):
        perturbed_model().generate(tokens(1, 4), max_new_tokens=3, speculate=SpeculationConfig(drafter="draft_head"))


def test_trainers_with_a_loss_of_their_own_would_drop_it():
    model = perturbed_model(draft_rank=4).train()
    with pytest.raises(ConfigError, match="draft_rank: trained by a loss that this trainer"):
        model(input_ids=tokens(1, 4), labels=tokens(1, 4), fused_lm_head=True)


def resaved(directory, change):
    """Rewrite the tensors of a saved shadow, with valid checksums."""
    tensors = read_tensors(str(directory))
    change(tensors)
    write_tensors(directory, tensors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda all: all.pop("shadow.draft_head.up.weight"), "needs other tensors, it has down.weight"),
        (lambda all: all.update({"shadow.draft_head.up.weight": torch.zeros(16, 4)}), r"up.weight \(16, 4\)"),
        (lambda all: all["shadow.draft_head.down.weight"].fill_(torch.nan), "it holds NaN or infinity"),
    ],
    ids=["missing", "another base", "not finite"],
)
def test_a_draft_head_that_does_not_fit_is_left_out(change, said, tmp_path):
    model, ids = perturbed_model(draft_rank=4), tokens(1, 8)
    model.save_pretrained(tmp_path)
    resaved(tmp_path, change)
    with pytest.warns(UserWarning, match=f"the draft head of .* is left out: .*{said}"):
        loaded = ShadowForCausalLM.from_pretrained(tmp_path, base=model.base)
    assert loaded.shadow.draft_head is None
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(**inputs, speculate=True), model.generate(**inputs))


def test_a_draft_vocabulary_of_another_tokenizer_is_left_out(tmp_path):
    model, ids = perturbed_model(), tokens(1, 8)
    model.set_draft_vocabulary(torch.arange(3, 60))
    model.save_pretrained(tmp_path)
    resaved(tmp_path, lambda all: all["shadow.draft_vocabulary"].add_(90))
    with pytest.warns(UserWarning, match="is left out: it has tokens beyond the base's 97"):
        loaded = ShadowForCausalLM.from_pretrained(tmp_path, base=model.base)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(**inputs, speculate=True), model.generate(**inputs))
