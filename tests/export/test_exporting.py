import importlib.util
import json

import numpy as np
import pytest
import torch

from shadowtune.errors import ShadowtuneError
from shadowtune.export import exporting, gguf_file
from shadowtune.export.exporting import FORMATS, check_export, compare, export, read_plain
from shadowtune.export.onnx_file import FILE, quantize, write_onnx
from shadowtune.export.runtimes import GgufModel, OnnxModel, TorchModel
from tests.export.support import NARROW, plain_model
from tests.support.shadows import tokens
from tests.support.tokenizers import tiny_tokenizer

PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (4, 9, 17)]
ROPES = {
    "default": {},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs onnxruntime")
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")


def difference(runtime, model, prompt):
    """Largest difference of log-probabilities."""
    pair = [torch.log_softmax(torch.tensor(one.logits(prompt)), -1) for one in (runtime, TorchModel(model))]
    return (pair[0] - pair[1]).abs().max().item()


@needs_onnx
@pytest.mark.parametrize("sizes", [{}, NARROW], ids=["same_width", "other_width"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_onnx_computes_what_torch_does(tmp_path, kind, sizes):
    model, tokenizer = plain_model(kind, **sizes)
    done = export((model, tokenizer), "onnx", "f32", tmp_path / "out", PROMPTS, 12)
    assert done.runtime == "OnnxModel"
    assert done.agreement.equal == done.agreement.tokens > 12
    assert difference(OnnxModel(tmp_path / "out", 1), model, PROMPTS[2]) < 1e-5


@needs_onnx
@torch.no_grad()
def test_onnx_takes_padded_batches_and_a_cache(tmp_path):
    model, _ = plain_model()
    model.config.save_pretrained(tmp_path)
    write_onnx(model, tmp_path / FILE, "f32")
    session = OnnxModel(tmp_path, 1).session
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    shape = (2, model.config.num_key_value_heads, 0, model.model.layers[0].self_attn.head_dim)
    cache = [np.zeros(shape, np.float32)] * (2 * model.config.num_hidden_layers)
    names = [output.name for output in session.get_outputs()]
    assert names[:3] == ["logits", "present.0.key", "present.0.value"]
    found = []
    for part in (slice(0, 5), slice(5, 8)):
        feed = {
            "input_ids": ids[:, part].numpy(),
            "attention_mask": mask[:, : part.stop].numpy(),
            "position_ids": positions[:, part].numpy(),
        }
        feed |= {name.replace("present", "past_key_values"): past for name, past in zip(names[1:], cache, strict=True)}
        logits, *cache = session.run(None, feed)
        found.append(torch.tensor(logits))
    real = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], expected[real], rtol=0, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize(("quantization", "limit"), [("f16", 0.01), ("int8", 0.4), ("int4", 3.0)])
def test_smaller_onnx_files_stay_close(tmp_path, quantization, limit):
    model, tokenizer = plain_model()
    export((model, tokenizer), "onnx", quantization, tmp_path / "out", PROMPTS, 8)
    assert 0 < difference(OnnxModel(tmp_path / "out", 1), model, PROMPTS[2]) < limit


@needs_onnx
def test_the_embedding_and_a_tied_head_are_one_stored_matrix(tmp_path):
    import onnx

    from shadowtune import ShadowConfig, ShadowForCausalLM
    from tests.support.bases import tiny_base
    from tests.support.shadows import perturb

    model = perturb(ShadowForCausalLM.from_base(tiny_base(tie_word_embeddings=True), ShadowConfig())).eval().detached()
    write_onnx(model, tmp_path / FILE, "int8")
    stored = [tensor for tensor in onnx.load(tmp_path / FILE).graph.initializer if tensor.dims[:1] == [97]]
    assert sorted(tensor.name for tensor in stored) == ["model.embed_tokens.codes", "model.embed_tokens.scales"]
    model.config.save_pretrained(tmp_path)
    assert difference(OnnxModel(tmp_path, 1), model, PROMPTS[2]) < 0.4


@pytest.mark.parametrize(("bits", "limit"), [(8, 1 / 127), (4, 1 / 8)])
def test_rounding_errs_by_half_a_step_at_most(bits, limit):
    matrix = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    codes, scales = quantize(matrix, bits)
    numbers = codes if bits == 8 else np.stack([codes & 15, codes >> 4], -1).reshape(5, 2, 32)
    restored = ((numbers.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]).reshape(5, 64)
    largest = np.abs(matrix.reshape(5, 2, 32)).max(-1).repeat(32, -1)
    assert (np.abs(restored - matrix) <= largest * limit * (0.51 if bits == 8 else 1.01)).all()


@needs_llama_cpp
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_computes_what_torch_does(tmp_path, kind, rope):
    if rope != "default" and kind != "llama":
        pytest.skip("llama.cpp scales frequencies of llama alone")
    model, tokenizer = plain_model(kind)
    if ROPES[rope]:
        model.config.rope_parameters |= ROPES[rope]
        model = type(model)(model.config).eval().requires_grad_(False)
        model.load_state_dict(plain_model(kind)[0].state_dict())
    done = export((model, tokenizer), "gguf", "f32", tmp_path / "out.gguf", PROMPTS, 12)
    assert done.runtime == "GgufModel"
    assert done.agreement.equal == done.agreement.tokens > 12
    assert difference(GgufModel(tmp_path / "out.gguf", 256, 1), model, PROMPTS[2]) < 5e-3


@needs_llama_cpp
def test_llama_cpp_ends_where_it_is_told_to_and_else_goes_on(tmp_path):
    model, tokenizer = plain_model()
    first = TorchModel(model).generate(PROMPTS[0], 1)[0]
    model.generation_config.eos_token_id = first
    gguf_file.write_gguf(model, tokenizer, tmp_path / "out.gguf", "f32")
    runtime = GgufModel(tmp_path / "out.gguf", 256, 1)
    assert runtime.generate(PROMPTS[0], 3, [first]) == []
    assert len(runtime.generate(PROMPTS[0], 3)) == 3
    assert runtime.prompt_seconds > 0


def test_without_llama_cpp_the_file_is_read_back_by_transformers(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "xllamacpp" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(exporting.importlib.util, "find_spec", missing)
    model, tokenizer = plain_model()
    done = export((model, tokenizer), "gguf", "f32", tmp_path / "out.gguf", PROMPTS, 12)
    assert done.runtime == "TorchModel"
    assert done.agreement.equal == done.agreement.tokens


def test_a_gguf_file_that_says_something_else_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "_interleave", lambda data, heads: data)
    model, tokenizer = plain_model()
    with pytest.raises(ShadowtuneError, match="gguf f32 chooses other tokens"):
        export((model, tokenizer), "gguf", "f32", tmp_path / "new" / "out.gguf", PROMPTS, 12)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantization", ["f16", "bf16", "int8"])
def test_smaller_safetensors_load_with_plain_transformers(tmp_path, quantization):
    model, tokenizer = plain_model()
    model.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    model, tokenizer = read_plain(tmp_path / "in")
    done = export((model, tokenizer), "safetensors", quantization, tmp_path / "out", PROMPTS, 8)
    assert done.bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    weights = [folder / "model.safetensors" for folder in (tmp_path / "in", tmp_path / "out")]
    assert weights[1].stat().st_size < 0.7 * weights[0].stat().st_size
    assert difference(TorchModel(tmp_path / "out", dtype=torch.float32), model, PROMPTS[2]) < 0.1


class Other(TorchModel):
    """Chooses another second token where it can, by adding to one logit."""

    def __init__(self, model, by):
        super().__init__(model)
        self.by = by

    def _step(self, input_ids, cache):
        found, longer = super()._step(input_ids, cache)
        if cache is not None:
            second = found.logits.argsort()[-2]
            found.logits[second] = found.logits.max() + self.by
        return found, longer


def test_another_choice_counts_unless_both_tokens_are_as_likely():
    model, _ = plain_model()
    agreement = compare(Other(model, 1.0), TorchModel(model), PROMPTS, 6, ())
    assert agreement.ties < len(PROMPTS)
    assert agreement.share < 0.6
    same = compare(TorchModel(model), TorchModel(model), PROMPTS, 6, ())
    assert (same.share, same.tokens, same.ties) == (1.0, 18, 0)


def test_an_end_is_a_token_like_others():
    model, _ = plain_model()
    first = TorchModel(model).generate(PROMPTS[0], 3)[0]
    assert TorchModel(model).generate(PROMPTS[0], 3, [first]) == []
    agreement = compare(TorchModel(model), TorchModel(model), PROMPTS[:1], 3, [first])
    assert (agreement.tokens, agreement.equal) == (1, 1)


@pytest.mark.parametrize(
    ("kind", "to"), [("gpt2", "gguf"), ("gemma2", "onnx"), ("mistral", "onnx"), ("mistral", "gguf")]
)
def test_what_a_format_cannot_express_is_refused(tmp_path, kind, to):
    model, tokenizer = plain_model(kind)
    with pytest.raises(ShadowtuneError, match=r"export supports llama, mistral, qwen2, qwen3 with"):
        export((model, tokenizer), to, "f32", tmp_path / "out", PROMPTS, 4)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused():
    from tokenizers import pre_tokenizers

    tokenizer = tiny_tokenizer()
    assert gguf_file.pre_tokenizer_name(tokenizer) == "gpt-2"
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits)
    assert gguf_file.pre_tokenizer_name(tokenizer) == "smollm"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ShadowtuneError, match="this one is BPE with"):
        gguf_file.pre_tokenizer_name(tokenizer)


def test_quantizations_belong_to_formats(monkeypatch):
    assert [check_export(to, None) for to in FORMATS] == ["f32", "f32", "f16"]
    with pytest.raises(ShadowtuneError, match="--to onnx has no --quant q8_0; it has f32, f16, int8, int4"):
        check_export("onnx", "q8_0")
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ShadowtuneError, match=r"pip install 'shadowtune\[export\]'"):
        check_export("gguf", "f16")


def test_a_classifier_or_a_damaged_directory_is_no_model_to_export(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})
    )
    with pytest.raises(ShadowtuneError, match="is a classifier"):
        read_plain(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ShadowtuneError, match="cannot read"):
        read_plain(tmp_path)
