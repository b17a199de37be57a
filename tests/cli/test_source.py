"""Every command takes every kind of model: a run, saved and exported files, Hub ids."""

import json
import shutil
from pathlib import Path

import pytest

from shadowtune.cli.main import main
from shadowtune.cli.source import open_source, source_path
from shadowtune.errors import CheckpointError
from tests.support.commands import write_config, write_rows


@pytest.fixture(scope="module")
def sources(shadow_run, lora_run, base, tmp_path_factory):
    """A model of each kind by its mode's name; all detached ones are the same shadow."""
    out = tmp_path_factory.mktemp("sources")
    assert main(["detach", str(shadow_run), "--out", str(out / "small")]) == 0
    found = {
        "run": shadow_run,
        "saved shadow": shadow_run / "model",
        "adapter": lora_run / "model",
        "detached": out / "small",
        "plain": base,
    }
    for kind, needed in (("onnx", "onnxruntime"), ("gguf", "xllamacpp")):
        try:
            __import__(needed)
        except ImportError:
            continue
        assert main(["export", str(out / "small"), "--to", kind, "--quant", "f32", "--out", str(out / kind)]) == 0
        found[kind] = out / kind
    if "onnx" in found:
        found["onnx file"] = out / "onnx" / "model.onnx"
    if "gguf" in found:
        found["gguf"] = (out / "gguf").rename(out / "small.gguf")
    return {name: str(path) for name, path in found.items()}


def answers(source, tmp_path, *options):
    file = tmp_path / "r.json"
    command = ["generate", source, "say one", "say ten", "--max-new-tokens", "5", "--json", str(file), *options]
    assert main(command) == 0
    return [row["answer"] for row in json.loads(file.read_text())["rows"]]


def test_all_files_of_a_model_give_its_answers(sources, tmp_path):
    expected = {mode: answers(sources["run"], tmp_path, "--mode", mode) for mode in ("attached", "detached", "base")}
    assert answers(sources["run"], tmp_path) == expected["attached"]
    assert answers(sources["plain"], tmp_path) == expected["base"]
    assert answers(sources["adapter"], tmp_path, "--mode", "base") == expected["base"]
    for mode in expected:
        assert answers(sources["saved shadow"], tmp_path, "--mode", mode) == expected[mode]
    for name in ("detached", "onnx", "onnx file", "gguf"):
        if name in sources:
            assert answers(sources[name], tmp_path) == expected["detached"], name


def test_all_files_of_a_model_are_measured_alike(sources, data, tmp_path):
    measured = {}
    for name, source in sources.items():
        command = ["evaluate", source, "--data", str(data), "--quiet", "--max-new-tokens", "3"]
        assert main([*command, "--json", str(tmp_path / "r.json")]) == 0
        for row in json.loads((tmp_path / "r.json").read_text())["rows"]:
            measured[name, row["mode"]] = (row["accuracy"], row.get("loss"))
    detached = measured["run", "detached"]
    assert measured["saved shadow", "detached"] == detached == measured["detached", "detached"]
    assert measured["plain", "base"] == measured["run", "base"] == measured["adapter", "base"]
    for name in ("onnx", "gguf"):
        if name in sources:
            assert measured[name, "detached"] == (detached[0], None)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("detached", ["generate", "hi", "--mode", "attached"], "is a detached model and has no mode 'attached'"),
        ("gguf", ["generate", "hi", "--mode", "attached"], "is a GGUF file and has no mode 'attached'; it has"),
        ("gguf", ["generate", "hi", "--num-beams", "2", "--max-new-tokens", "4"], "leave --num-beams and"),
        ("plain", ["generate", "hi", "--speculate"], "is a plain model; leave it out"),
        ("adapter", ["generate", "hi", "--mode", "detached"], "is an adapter of PEFT (LORA) and has no mode"),
        ("onnx", ["evaluate"], "is an ONNX model and has no examples of its own; pass --data FILE"),
        ("detached", ["evaluate", "--quantization", "int8"], "--quantization is of"),
        ("adapter", ["serve edge"], "only a shadow runs without its base"),
        ("gguf", ["serve cloud"], "serve edge"),
        ("detached", ["serve cloud"], "is not a shadow"),
    ],
)
def test_what_a_kind_of_model_cannot_do_is_one_line(name, arguments, said, sources, capsys, monkeypatch):
    from shadowtune.cli import serve

    if name not in sources:
        pytest.skip(f"no package for {name}")
    monkeypatch.setattr(serve, "run_server", lambda config, build: build() and 0)
    command, *options = arguments
    assert main([*command.split(), sources[name], *options]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("shadowtune: error: ") and said in line


def test_a_classifier_is_opened_from_each_of_its_files(base, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": word, "label": len(word) % 3} for word in ("a", "at", "the")])
    config = write_config(tmp_path / "c.yaml", base, data, tmp_path / "run", "task: classification\n")
    assert main(["train", str(config), "--quiet"]) == 0
    assert main(["detach", str(tmp_path / "run"), "--out", str(tmp_path / "small")]) == 0
    losses = {}
    for path in (tmp_path / "run", tmp_path / "run" / "model", tmp_path / "small"):
        opened = open_source(str(path))
        assert opened.source.task == "classification"
        losses[path.name] = opened.evaluate("detached", str(data)).loss
    assert losses["run"] == losses["model"] == pytest.approx(losses["small"], rel=1e-5)


def test_a_name_that_is_nothing_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("nothing", "runs/nothing", "a/b/c"):
        assert main(["generate", name, "hi"]) == 2
        assert f"there is no {name}: name a run directory" in capsys.readouterr().err
    assert main(["generate", "runs", "hi"]) == 2
    assert "runs holds no model" in capsys.readouterr().err
    (tmp_path / "runs" / "config.json").write_text("[")
    assert main(["generate", "runs", "hi"]) == 2
    assert "config.json is damaged" in capsys.readouterr().err
    (tmp_path / "runs" / "model.txt").touch()
    assert main(["generate", "runs/model.txt", "hi"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub whose repositories are directories; a repository that is an exception cannot be read."""
    from shadowtune.model import hub

    repositories = {}

    def files_of(name):
        if isinstance(repositories[name], Exception):
            raise repositories[name]
        return [str(file.relative_to(repositories[name])) for file in Path(repositories[name]).rglob("*")]

    def snapshot(name, allow_patterns=None, local_files_only=False):
        out = tmp_path / "cache" / name
        out.mkdir(parents=True, exist_ok=True)
        for file in [] if local_files_only else allow_patterns:
            shutil.copy(Path(repositories[name]) / file, out)
        return str(out)

    class Api:
        def list_repo_files(self, name):
            return files_of(name)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file: str(Path(repositories[name]) / file))
    return repositories


def test_a_model_of_the_hub_is_downloaded_in_one_format(sources, hub, tmp_path, monkeypatch):
    hub["me/small"] = tmp_path / "me-small"
    shutil.copytree(sources["detached"], hub["me/small"])
    (hub["me/small"] / "pytorch_model.bin").touch()
    expected = answers(sources["detached"], tmp_path)
    assert answers("me/small", tmp_path) == expected
    assert not (tmp_path / "cache" / "me" / "small" / "pytorch_model.bin").exists()
    hub["me/small"] = ConnectionError("no network")
    assert answers("me/small", tmp_path) == expected  # from the cache
    if "gguf" in sources:
        hub["me/gguf"] = tmp_path / "me-gguf"
        hub["me/gguf"].mkdir()
        shutil.copy(sources["gguf"], hub["me/gguf"])
        assert source_path("me/gguf") == hub["me/gguf"] / "small.gguf"
        (hub["me/gguf"] / "other.gguf").touch()
        with pytest.raises(CheckpointError, match="several GGUF files"):
            source_path("me/gguf")


@pytest.mark.parametrize(("status", "said"), [(401, "hf auth login"), (404, "there is no such repository"), (500, "x")])
def test_what_the_hub_refuses_is_one_line(status, said, hub, capsys):
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    response = httpx2.Response(status, request=httpx2.Request("GET", "https://hub.test"))
    hub["me/none"] = HfHubHTTPError("x\ny", response=response)
    assert main(["generate", "me/none", "hi"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot load me/none" in line and said in line


def test_commands_for_shadows_take_one_of_the_hub(sources, hub, tmp_path, monkeypatch):
    hub["me/shadow"] = sources["saved shadow"]
    monkeypatch.chdir(tmp_path)
    assert main(["info", "me/shadow", "--json", "i.json"]) == 0
    assert main(["info", sources["saved shadow"], "--json", "j.json"]) == 0
    here, there = (json.loads(Path(file).read_text())["rows"] for file in ("i.json", "j.json"))
    assert here == there
    assert main(["detach", "me/shadow", "--out", "small"]) == 0
    assert answers("small", tmp_path) == answers(sources["detached"], tmp_path)
    export = ["export", "me/shadow", "--to", "safetensors", "--max-new-tokens", "2", "--limit", "1"]
    assert main(export) == 0
    assert (tmp_path / "shadow-safetensors-f16" / "model.safetensors").is_file()  # not in the Hub's cache
    assert main(["doctor", "me/shadow", "--json", "d.json"]) == 0


def test_the_harness_takes_any_model_of_torch(sources, hub, tmp_path, monkeypatch, capsys):
    seen = []

    def evaluate(source, mode, *options):
        seen.append((source.source.name, mode))
        return [{"task": "x", "value": 1.0}]

    hub["me/shadow"] = sources["saved shadow"]
    with monkeypatch.context() as patch:
        patch.setattr("shadowtune.evaluation.harness.evaluate_with_harness", evaluate)
        assert main(["lm-eval", "me/shadow", "--tasks", "x"]) == 0
        assert main(["lm-eval", sources["detached"], "--tasks", "x"]) == 0
    modes = ("attached", "detached", "base")
    assert seen == [*(("me/shadow", mode) for mode in modes), (sources["detached"], "detached")]
    if "gguf" in sources:
        pytest.importorskip("lm_eval")
        assert main(["lm-eval", sources["gguf"], "--tasks", "x"]) == 2
        assert "is a GGUF file, and the harness runs models of torch" in capsys.readouterr().err.splitlines()[-1]
