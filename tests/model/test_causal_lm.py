import pytest
import torch
import torch.nn.functional as F

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.compatibility import cache_of
from shadowtune.core import losses, reference
from shadowtune.core.losses import linear_cross_entropy
from shadowtune.errors import ConfigError, ShadowtuneError
from tests.support.bases import tiny_base, tiny_classifier
from tests.support.shadows import perturb, perturbed_model, tokens

MODES = ("attached", "detached", "base")


@pytest.fixture(scope="module")
def model():
    return perturbed_model(shadow_loss_weight=0.3)


@pytest.fixture(autouse=True)
def restored(model):
    yield
    model.eval().set_mode("attached")


def labels_like(ids):
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 6:] = -100
    return labels


def test_the_joint_loss_and_its_two_terms(model):
    ids = tokens(3, 9)
    labels = labels_like(ids)
    output = model(ids, labels=labels)
    attached, detached = (model.set_mode(mode)(ids).logits.double() for mode in ("attached", "detached"))
    torch.testing.assert_close(output.base_loss.double(), reference.cross_entropy(attached, labels), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        output.shadow_loss.double(), reference.cross_entropy(detached, labels), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(output.loss, output.base_loss + 0.3 * output.shadow_loss)


def test_each_mode_reports_its_own_loss(model):
    ids = tokens(3, 9)
    labels = labels_like(ids)
    both = model(ids, labels=labels)
    alone = model.set_mode("detached")(ids, labels=labels)
    assert alone.base_loss is None
    torch.testing.assert_close(alone.loss, both.shadow_loss)
    torch.testing.assert_close(alone.shadow_loss, both.shadow_loss)
    base = model.set_mode("base")(ids, labels=labels)
    torch.testing.assert_close(base.loss, model.base(ids, labels=labels).loss)


def test_with_a_weight_of_zero_the_shadows_loss_is_not_reported():
    model, ids = perturbed_model(shadow_loss_weight=0.0), tokens(2, 9)
    output = model(ids, labels=ids)
    assert output.shadow_loss is None
    assert torch.equal(output.loss, output.base_loss)


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_add_up_under_the_items_of_the_step(model, mode):
    ids = tokens(3, 9)
    labels = labels_like(ids)
    count = int((labels[:, 1:] != -100).sum())
    whole = model.set_mode(mode)(ids, labels=labels).loss
    parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(3)]
    torch.testing.assert_close(sum(parts), whole)


def test_without_any_label_loss_and_gradients_are_zero(model):
    ids = tokens(2, 9)
    model.train()
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    assert loss == 0
    gradients = torch.autograd.grad(loss, list(model.shadow.parameters()), allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


def test_in_training_only_labelled_positions_reach_the_head(model, monkeypatch):
    ids, seen = tokens(3, 9), []

    def spy(head, h, s, *rest):
        seen.append((len(h), len(s)))
        return linear_cross_entropy(head, h, s, *rest)

    monkeypatch.setattr(losses, "linear_cross_entropy", spy)
    hook = model.base.lm_head.register_forward_hook(lambda *call: seen.append(call))
    output = model.train()(ids, labels=labels_like(ids))
    hook.remove()
    assert output.logits is None
    assert seen == [(int((labels_like(ids)[:, 1:] != -100).sum()),) * 2]


def test_a_head_that_is_trained_gets_its_gradient(model):
    ids = tokens(3, 9)
    weight = model.base.get_output_embeddings().weight.requires_grad_()
    model.train()(ids, labels=ids).loss.backward()
    assert weight.grad.abs().sum() > 0


def test_in_evaluation_labels_come_with_logits(model):
    ids = tokens(3, 9)
    output = model(ids, labels=ids)
    assert torch.equal(output.logits, model(ids, use_cache=False).logits)
    assert cache_of(output) is None
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.base_loss, loss)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kept", [1, 3, 0, torch.tensor([2, 0, 7])], ids=str)
@torch.no_grad()
def test_logits_to_keep(model, mode, kept):
    ids = tokens(2, 9)
    logits = model.set_mode(mode)(ids).logits
    expected = logits[:, kept] if isinstance(kept, torch.Tensor) else logits[:, -kept:] if kept else logits
    torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_tuples_and_hidden_states_on_request(model, mode):
    ids = tokens(2, 9)
    output = model.set_mode(mode)(ids, use_cache=False)
    assert torch.equal(model(ids, use_cache=False, return_dict=False)[0], output.logits)
    assert output.hidden_states is None
    if mode == "attached":
        found = model(ids, output_hidden_states=True).hidden_states
        assert len(found) == 5
        torch.testing.assert_close(model.logits_of(found[-1]), output.logits)


@torch.no_grad()
def test_explicit_positions_are_heeded_by_both_networks(model):
    ids = tokens(2, 9)
    packed = torch.cat([torch.arange(4), torch.arange(5)]).expand(2, -1)
    for mode in ("attached", "detached"):
        default = model.set_mode(mode)(ids, use_cache=False).logits
        given = model(ids, position_ids=torch.arange(9).expand(2, -1), use_cache=False).logits
        torch.testing.assert_close(given, default, rtol=0, atol=1e-6)
        together = model(ids, position_ids=packed, use_cache=False).logits  # two texts in one row
        apart = [model(part, use_cache=False).logits for part in ids.split([4, 5], 1)]
        torch.testing.assert_close(together, torch.cat(apart, 1), rtol=0, atol=1e-5)


def test_packed_texts_give_the_loss_and_gradients_of_texts_alone(model):
    one, two = tokens(1, 4), tokens(1, 5, seed=1)
    model.train()
    runs = []
    for packed in (True, False):
        if packed:
            labels = torch.cat([one, two], 1)
            labels[0, 4] = -100
            positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
            loss = _undropped(model)(torch.cat([one, two], 1), position_ids=positions, labels=labels).loss
        else:
            loss = sum(_undropped(model)(ids, labels=ids, num_items_in_batch=7).loss for ids in (one, two))
        runs.append([loss, *torch.autograd.grad(loss, list(model.shadow.parameters()))])
    for together, apart in zip(*runs, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)


def _undropped(model):
    model.shadow.eval()
    return model


def test_the_modes_of_dropout_follow_train_and_eval(model):
    ids = tokens(2, 9)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "granite", "opt", "gpt2"])
@torch.no_grad()
def test_logits_are_finished_as_the_base_does(kind):
    base, ids = tiny_base(kind), tokens(2, 9)
    model = ShadowForCausalLM.from_base(base)
    hidden = base.get_decoder()(ids).last_hidden_state
    torch.testing.assert_close(model.logits_of(hidden), base(ids).logits, rtol=0, atol=0)


def test_a_backbone_with_its_own_embedding_needs_token_ids(tmp_path):
    tiny_base("qwen2", seed=5).save_pretrained(tmp_path)
    model = perturbed_model(backbone=str(tmp_path))
    with pytest.raises(ShadowtuneError, match="pass input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 32))


def test_a_base_without_a_language_model_head_is_an_error():
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification has no language model head"):
        ShadowForCausalLM.from_base(tiny_classifier())


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_labels_of_other_positions_are_an_error(model, mode, name):
    ids = tokens(2, 9)
    with pytest.raises(ConfigError, match="give each position of the input a label"):
        model.set_mode(mode)(ids, **{"labels": ids[:, :8], name: ids[:, :8]})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_a_negative_label_other_than_the_ignored_one_is_an_error(model, mode, training):
    ids = tokens(2, 9)
    labels = torch.where(ids > 40, ids, -1)
    with pytest.raises(ConfigError, match="labels hold -1; only -100 means"):
        model.train(training).set_mode(mode)(ids, labels=labels)


def test_learning_lowers_both_losses():
    torch.manual_seed(0)
    model = perturb(ShadowForCausalLM.from_base(tiny_base(), ShadowConfig(rank=4, shadow_loss_weight=1.0)), scale=0.02)
    ids = tokens(4, 12)
    optimizer = torch.optim.AdamW(model.shadow.parameters(), lr=2e-2)
    losses = []
    for _ in range(30):
        output = model.train()(ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((output.base_loss.item(), output.shadow_loss.item()))
    assert losses[-1][0] < 0.8 * losses[0][0]
    assert losses[-1][1] < 0.7 * losses[0][1]
