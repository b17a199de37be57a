"""The generated schemas and the settings reference are current, and the schemas accept our own files."""

import json
import re
from pathlib import Path

import pytest
import yaml

from shadowtune.cli.main import main
from shadowtune.config.loading import SHIPPED, _YamlLoader
from shadowtune.config.schema import SCHEMAS, json_schema, settings_reference

ROOT = Path(__file__).parents[2]
FILES = {
    "train": [*SHIPPED.glob("*.yaml"), *SHIPPED.glob("leaderboard/*.yaml")],
    "compare": sorted(SHIPPED.glob("compare/*.yaml")),
    "task": sorted(SHIPPED.parent.glob("data/tasks/*.yaml")),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_is_current(name, capsys):
    assert main(["schema", name]) == 0
    file = SHIPPED / "schema" / f"{name}.json"
    current = json.loads(capsys.readouterr().out)  # versions of pydantic differ in 0 and 0.0
    assert json.loads(file.read_text()) == current, f"run: shadowtune schema {name} > {file.relative_to(ROOT)}"


def test_the_settings_reference_is_current(capsys):
    assert main(["schema", "reference"]) == 0
    text = (ROOT / "docs" / "settings.md").read_text()
    assert text == capsys.readouterr().out, "run: shadowtune schema reference > docs/settings.md"


@pytest.mark.parametrize("name", FILES)
def test_the_schema_accepts_our_files_and_nothing_misspelt(name):
    validator = pytest.importorskip("jsonschema_rs").validator_for(json_schema(name))
    for file in FILES[name]:
        values = yaml.load(re.sub(r"(?<=[ \[]\d)e-", ".0e-", file.read_text()), _YamlLoader)  # as YAML 1.2
        errors = [error.message for error in validator.iter_errors(values)]
        assert not errors, (file, errors)
        assert not validator.is_valid({**values, "nothing": 1})


@pytest.mark.parametrize(
    "file", [file for name in ("train", "compare") for file in FILES[name]], ids=lambda file: file.stem
)
def test_every_file_names_its_schema(file):
    (schema,) = re.findall(r"^# yaml-language-server: \$schema=(.*)$", file.read_text(), re.MULTILINE)
    kind = "train" if file in FILES["train"] else "compare"
    assert (file.parent / schema).resolve() == SHIPPED / "schema" / f"{kind}.json"


def test_the_reference_has_a_text_for_every_setting_but_documents_no_class_twice():
    lines = settings_reference().splitlines()
    assert not [line for line in lines if line.startswith("- **") and line.endswith(")")]
    heads = [line for line in lines if line.startswith("### ")]
    assert len(heads) == len(set(heads))


def test_a_comparison_describes_the_settings_of_its_runs():
    schema = json_schema("compare")
    text = json.dumps(schema["$defs"]["Method"])
    assert "shadow_epochs" in text and "lora-plus" in text
    assert "output" not in schema["$defs"]["RunSettings"]["properties"], "the comparison sets it"
