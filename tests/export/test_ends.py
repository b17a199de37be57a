"""Whatever form a trained model takes, it stops where its training rows ended."""

import importlib.util
import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadowtune import ShadowForCausalLM
from shadowtune.cli.main import main
from shadowtune.errors import ShadowtuneError
from shadowtune.evaluation.run import FinishedRun
from shadowtune.export import gguf_file
from shadowtune.export.exporting import export
from shadowtune.export.loading import load_model
from shadowtune.export.runtimes import GgufModel
from shadowtune.serving.edge.local import LocalModel
from tests.export.support import plain_model
from tests.serving.edge.models import GREEDY, answered, ask
from tests.support.bases import tiny_base
from tests.support.chats import CHATML_STOP, STOP, chat_tokenizer, learned_run
from tests.support.shadows import perturbed_model, tokens

ROWS = [
    {"prompt": "tea", "completion": "hot"},
    {"prompt": "sea", "completion": "wet"},
    {"prompt": "sun", "completion": "big"},
]
MESSAGES = [{"role": "user", "content": "sea"}]
STOP_ID = chat_tokenizer().convert_tokens_to_ids(STOP)
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs onnxruntime")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose turns end in a token that neither the base (0) nor the tokenizer (2) ends in."""
    return learned_run(
        tmp_path_factory.mktemp("learned"), ROWS, chat_tokenizer(CHATML_STOP), 80, base={"eos_token_id": 0}
    )


@pytest.fixture(scope="module")
def detached(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("detached") / "small"
    assert main(["detach", str(run), "--out", str(out)]) == 0
    return out


def plain_answer(directory):
    """What transformers alone generates for a chat message: its tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    fresh = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokenizer.decode(fresh[:-1]).strip(), fresh[-1]


def test_attached_and_detached_stop_in_plain_transformers(run, detached):
    assert plain_answer(run / "model") == ("wet", STOP_ID)
    assert plain_answer(detached) == ("wet", STOP_ID)
    assert json.loads((detached / "generation_config.json").read_text())["eos_token_id"] == [STOP_ID, 0, 2]
    assert json.loads((detached / "config.json").read_text())["eos_token_id"] == STOP_ID


def test_evaluate_and_generate_stop(run, tmp_path):
    finished = FinishedRun.open(run)
    found = finished.evaluate("attached", source=str(run.parent / "rows.jsonl"), max_new_tokens=20)
    assert found.accuracy == 1.0
    assert [answer[-1] for answer in found.answers] == [STOP_ID] * 3
    for mode in ("attached", "detached"):
        out = tmp_path / f"{mode}.json"
        assert main(["generate", str(run), "sea", "--mode", mode, "--max-new-tokens", "20", "--json", str(out)]) == 0
        (row,) = json.loads(out.read_text())["rows"]
        assert (row["answer"], row["new_tokens"]) == ("wet", 4)


def test_the_edge_stops_in_every_format(run, detached, tmp_path):
    kinds = ["safetensors"]
    kinds += ["onnx"] if importlib.util.find_spec("onnxruntime") else []
    kinds += ["gguf"] if importlib.util.find_spec("xllamacpp") else []
    for kind in kinds:
        out = tmp_path / f"model.{kind}"
        assert main(["export", str(detached), "--to", kind, "--quant", "f32", "--out", str(out)]) == 0
        opened = load_model(out)
        assert opened.ends == {STOP_ID, 0, 2}
        asked = ask(prompt=None, messages=MESSAGES, max_tokens=20, sampling=GREEDY)
        pieces, _ = answered(LocalModel(opened, "tiny"), asked)
        assert "".join(piece.text for piece in pieces).strip() == "wet"
        assert pieces[-1].finish_reason == "stop"


@needs_llama_cpp
def test_llama_cpp_stops_by_itself(detached, tmp_path):
    import gguf

    out = tmp_path / "model.gguf"
    assert main(["export", str(detached), "--to", "gguf", "--out", str(out)]) == 0
    fields = gguf.GGUFReader(out).fields
    for name in ("eos", "eot"):
        assert fields[f"tokenizer.ggml.{name}_token_id"].contents() == STOP_ID
    runtime = GgufModel(out, 256, 1)
    answer = runtime._ask("/v1/chat/completions", messages=MESSAGES, max_tokens=20, temperature=0)
    assert answer["choices"][0]["message"]["content"].strip() == "wet"
    assert answer["choices"][0]["finish_reason"] == "stop"


@needs_llama_cpp
def test_of_several_ends_the_gguf_file_names_the_one_that_was_taught(tmp_path):
    import gguf

    run = learned_run(tmp_path, ROWS, chat_tokenizer(CHATML_STOP), 1, base={"eos_token_id": [0, 2, STOP_ID]})
    out = tmp_path / "model.gguf"
    assert main(["export", str(run), "--to", "gguf", "--out", str(out), "--max-new-tokens", "2"]) == 0
    fields = gguf.GGUFReader(out).fields
    named = {name: fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot", "eom")}
    assert named == {"eos": STOP_ID, "eot": STOP_ID, "eom": 0}
    assert load_model(out).ends == {0, 2, STOP_ID}


@needs_llama_cpp
def test_a_gguf_file_that_does_not_stop_at_its_end_is_not_kept(tmp_path, monkeypatch):
    model, tokenizer = plain_model()
    model.generation_config.eos_token_id = [7, 9]
    monkeypatch.setattr(gguf_file, "_add_ends", lambda writer, ends: writer.add_eos_token_id(5))
    prompts = [tokens(1, 5)[0].tolist()]
    with pytest.raises(ShadowtuneError, match=r"llama\.cpp does not stop at token 7, which ends an answer"):
        export((model, tokenizer), "gguf", "f32", tmp_path / "out.gguf", prompts, 4)
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_other_special_tokens_are_compared_like_any_token(tmp_path):
    """An answer of a model that chooses its padding or unknown token goes on, and so does the comparison."""
    model, tokenizer = plain_model()
    model.lm_head.weight.data[3] *= 20  # the unknown token, over and over for some prompts
    prompts = [tokens(1, 5, seed=seed)[0].tolist() for seed in range(4)]
    agreement = export((model, tokenizer), "onnx", "f32", tmp_path / "out", prompts, 6).agreement
    assert any(3 in answer for answer in agreement.expected)
    assert agreement.tokens == agreement.equal


def test_an_adapters_own_generation_config_is_carried_to_its_detached_model(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    model = perturbed_model()
    model.config.base_name_or_path = str(tmp_path / "base")
    model.generation_config.eos_token_id = [5, 7]
    model.generation_config.repetition_penalty = 1.3
    assert model.base.generation_config.repetition_penalty != 1.3
    model.save_pretrained(tmp_path / "adapter")
    loaded = ShadowForCausalLM.from_pretrained(tmp_path / "adapter")
    for plain in (model.detached(), loaded.detached()):
        assert plain.generation_config.eos_token_id == [5, 7]
        assert plain.generation_config.repetition_penalty == 1.3
        plain.generation_config.repetition_penalty = 2.0
    assert loaded.generation_config.repetition_penalty == 1.3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_methods_record_their_ends_too(method, tmp_path):
    if method == "lora":
        pytest.importorskip("peft")
    run = learned_run(tmp_path, ROWS, chat_tokenizer(CHATML_STOP), 40, base={"eos_token_id": 0}, method=method)
    finished = FinishedRun.open(run)
    assert finished.prompt_format.ends == (STOP_ID, 0, 2)
    if method == "full":
        assert finished.model.generation_config.eos_token_id == [STOP_ID, 0, 2]
    found = finished.evaluate("attached", source=str(tmp_path / "rows.jsonl"), max_new_tokens=20)
    assert any(answer[-1] == STOP_ID and len(answer) < 20 for answer in found.answers)


@needs_onnx
def test_onnxruntime_genai_is_told_the_ends_and_the_penalty(detached, tmp_path):
    out = tmp_path / "onnx"
    assert main(["export", str(detached), "--to", "onnx", "--out", str(out)]) == 0
    written = json.loads((out / "genai_config.json").read_text())
    assert written["model"]["eos_token_id"] == [STOP_ID, 0, 2]
    assert written["search"]["repetition_penalty"] == 1.0
    onnxruntime_genai = pytest.importorskip("onnxruntime_genai")
    opened = load_model(out)
    ids = opened.prompt_format.encode(MESSAGES, opened.tokenizer)
    model = onnxruntime_genai.Model(str(out))
    settings = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + 20)
    generator = onnxruntime_genai.Generator(model, settings)
    generator.append_tokens(ids)
    fresh = []
    while not generator.is_done():
        generator.generate_next_token()
        fresh.append(int(generator.get_next_tokens()[0]))
    assert opened.tokenizer.decode(fresh[:-1]).strip() == "wet"
    assert fresh[-1] == STOP_ID
