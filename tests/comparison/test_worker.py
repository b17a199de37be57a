import json
from dataclasses import replace

import pytest

from shadowtune.comparison import worker
from shadowtune.comparison.plan import Plan
from shadowtune.errors import CheckpointError
from tests.support.comparisons import SHADOW, compare_config


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    (job,) = Plan.of(compare_config(path, methods={"shadow": {"shadow": SHADOW}})).finals()
    worker.run(job)
    return job


def test_a_run_leaves_its_model_its_evaluations_and_a_row_but_no_checkpoints(done):
    names = {path.name for path in done.path.iterdir()}
    assert names >= {"model", "summary.json", "final.json", *(request.file for request in done.requests)}
    assert "checkpoints" not in names
    kept = json.loads((done.path / done.requests[0].file).read_text())
    assert len(kept["predictions"]) == len(kept["scores"]) == 8
    attached, detached = done.result()["evaluations"]
    assert not {"predictions", "answers"} & attached.keys()
    assert attached["agreement"] is None
    assert 0 <= detached["agreement"] < 1


def test_an_evaluation_that_is_there_is_taken_and_the_others_are_made(done):
    first, second = (done.path / request.file for request in done.requests)
    agreement = json.loads(second.read_text())["agreement"]
    first.write_text(json.dumps({**json.loads(first.read_text()), "loss": -1.0}))
    second.unlink()
    done.result_file.unlink()
    worker.run(done)
    assert [each["loss"] == -1.0 for each in done.result()["evaluations"]] == [True, False]
    assert json.loads(second.read_text())["agreement"] == agreement


def test_a_base_is_evaluated_as_it_is(tmp_path):
    (job,) = Plan.of(compare_config(tmp_path, methods={"base": None})).finals()
    worker.run(job)
    row = job.result()
    assert row["training"] is None
    assert [each["mode"] for each in row["evaluations"]] == ["base"]
    assert not (job.path / "model").exists()


def test_a_missing_base_is_named(tmp_path):
    (job,) = Plan.of(compare_config(tmp_path, methods={"base": None})).finals()
    gone = replace(job, config=replace(job.config, model="./nowhere"))
    with pytest.raises(CheckpointError, match="nowhere"):
        worker.run(gone)
