import json

import pytest

from shadowtune.cli.main import main


@pytest.fixture
def small(shadow_run, tmp_path):
    assert main(["detach", str(shadow_run), "--out", str(tmp_path / "small")]) == 0
    return tmp_path / "small"


def test_a_detached_directory_is_exported_beside_itself(small, capsys):
    pytest.importorskip("xllamacpp")
    assert main(["export", str(small), "--to", "gguf", "--quant", "f16", "--max-new-tokens", "8"]) == 0
    assert (small.parent / "small-f16.gguf").is_file()
    assert sorted(path.name for path in small.parent.iterdir()) == ["small", "small-f16.gguf"]
    assert "GgufModel" in capsys.readouterr().out


def test_a_run_is_detached_first_and_measured_on_its_held_out_rows(shadow_run, data, tmp_path):
    pytest.importorskip("onnxruntime")
    config = shadow_run / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("validation: null", f"validation: {data}"))
    try:
        command = ["export", str(shadow_run), "--to", "onnx", "--quant", "int8", "--out", str(tmp_path / "out")]
        assert main([*command, "--limit", "5", "--max-new-tokens", "4", "--json", str(tmp_path / "r.json")]) == 0
    finally:
        config.write_text(before)
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert row["prompts"] == 5
    assert 0 <= row["equal tokens"] <= 1
    assert {"accuracy", "accuracy before"} <= row.keys()
    assert (tmp_path / "out" / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--to", "onnx", "--quant", "q4_0"], "--to onnx has no --quant q4_0"),
        (["--to", "safetensors", "--limit", "0"], "--limit must be at least 1"),
        (["--to", "safetensors", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--to", "safetensors", "--out", "SMALL"], "exists already"),
    ],
)
def test_what_cannot_be_exported_is_one_line(small, extra, said, capsys):
    before = sorted(path.name for path in small.iterdir())
    assert main(["export", str(small), *(word.replace("SMALL", str(small)) for word in extra)]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in small.iterdir()) == before
    assert [path.name for path in small.parent.iterdir()] == ["small"]


def test_what_is_no_model_is_one_line(tmp_path, capsys):
    for name, said in (("nothing", "there is no"), ("damaged", "cannot read a model from")):
        if name == "damaged":
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text("[")
        assert main(["export", str(tmp_path / name), "--to", "onnx"]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
