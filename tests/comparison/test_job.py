import json
from dataclasses import replace

import pytest

from shadowtune.comparison.job import EvaluationRequest, Job, differences, digest, read_json
from shadowtune.config.settings import from_mapping
from shadowtune.config.shadow import ShadowConfig
from shadowtune.config.training import DataConfig, TrainConfig
from shadowtune.errors import CheckpointError

DATA = DataConfig(train="rows")


def request(**changes):
    return EvaluationRequest(
        **{"task": "t", "mode": "attached", "split": "test", "limit": 5, "batch_size": 4, "data": DATA, **changes}
    )


def job(path, **changes):
    settings = {
        "stage": "final",
        "task": "t",
        "method": "shadow",
        "seed": 3,
        "config": TrainConfig(data=DATA, output=str(path), shadow=ShadowConfig(init_layers=(0, 1))),
        "trains": True,
        "requests": (request(), request(mode="detached")),
    }
    return Job(**{**settings, **changes})


def test_only_what_is_not_the_default_counts():
    assert differences(TrainConfig(data=DATA, shadow=ShadowConfig(rank=3))) == {
        "data": {"train": "rows"},
        "shadow": {"rank": 3},
    }


def test_a_name_changes_with_the_training_and_nothing_else(tmp_path):
    made = job(tmp_path)
    assert made.name.startswith("t/shadow/seed-3-")
    assert made.path == tmp_path / made.name
    other = replace(made.config, epochs=2.0)
    assert job(tmp_path, config=other).name != made.name
    assert job(tmp_path / "elsewhere").name == made.name
    assert job(tmp_path, requests=(), stage="trial", setting={"epochs": 1}, size="x").name == made.name


def test_a_file_of_an_evaluation_changes_with_everything_that_changes_its_result():
    changed = [
        {},
        {"limit": 6},
        {"split": "validation"},
        {"mode": "base"},
        {"source": "x"},
        {"data": DataConfig(train="y")},
    ]
    assert len({request(**change).file for change in changed}) == len(changed)


def test_a_digest_is_the_same_in_every_process():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) == "ae8a9a50"


def test_a_job_passes_through_json(tmp_path):
    made = job(tmp_path, setting={"optimizer.learning_rate": 1e-3})
    from dataclasses import asdict

    assert from_mapping(Job, json.loads(json.dumps(asdict(made))), where="") == made


def test_a_job_is_done_when_it_has_left_what_is_asked_for(tmp_path):
    made = job(tmp_path)
    assert not made.is_done()
    made.write(seconds=1.0, evaluations=[], training=None, provenance=None)
    assert made.is_done()
    assert made.result()["seconds"] == 1.0
    assert made.result()["config"]["shadow"]["init_layers"] == [0, 1]
    assert not job(tmp_path, requests=(request(),)).is_done()
    assert not job(tmp_path, stage="trial").is_done()


def test_a_failure_is_kept_and_is_not_done(tmp_path):
    made = job(tmp_path)
    made.write(error="no", seconds=1.0, evaluations=[], training=None, provenance=None)
    assert made.result()["error"] == "no"
    assert not made.is_done()


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"x.json is damaged .*; delete it"):
        read_json(tmp_path / "x.json")
