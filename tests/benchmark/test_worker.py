import io
import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from shadowtune.benchmark.train import TrainSettings
from shadowtune.benchmark.worker import Service, methods_of, serve

OPEN = {"bench": "train", "name": "lora", "arguments": {"size": 2}}
SETTINGS = asdict(TrainSettings(model="tiny", batch=2, length=16))


def ask(*requests):
    answers = io.StringIO()
    serve(methods_of(Service()), [json.dumps(request) for request in requests], answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_each_request_is_answered_with_one_line():
    opened, prepared, first, second = ask(
        ["open", {**OPEN, "settings": SETTINGS}],
        ["prepare", {"values": {"rows": 2, "length": 16, "labelled": 0.5}}],
        ["measure", {}],
        ["measure", {}],
    )
    assert opened == {"result": {"size": "rank 2", "trainable_parameters": 2 * 4864, "facts": {}}}
    assert prepared["result"]["peak_memory_mb"] >= 0
    assert prepared["result"]["size"] == opened["result"]["size"]
    assert first["result"] > 0
    assert second["result"] > 0


def test_what_a_user_did_wrong_is_an_answer_and_the_worker_goes_on():
    wrong, right = ask(
        ["open", {**OPEN, "settings": {**SETTINGS, "model": "./nowhere"}}], ["open", {**OPEN, "settings": SETTINGS}]
    )
    assert "cannot load the model ./nowhere" in wrong["error"]
    assert right["result"]["size"] == "rank 2"


def test_what_libraries_print_stays_out_of_the_answers():
    code = "import shadowtune.benchmark.worker as w; w.Service.measure = lambda self: print('noise') or 1.0; w.main()"
    done = subprocess.run([sys.executable, "-c", code], input='["measure", {}]\n', capture_output=True, text=True)
    assert json.loads(done.stdout) == {"result": 1.0}
    assert "noise" in done.stderr


def test_what_nobody_should_do_ends_the_worker():
    with pytest.raises(KeyError):
        ask(["dance", {}])
