import json
import math

import pytest
import torch

from shadowtune.errors import DataError
from shadowtune.evaluation.harness import evaluate_with_harness
from shadowtune.evaluation.run import FinishedRun
from shadowtune.training.run import train
from tests.support.runs import run_config
from tests.support.shadows import perturb

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
ANSWER = """output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""
ROWS = [
    {"question": "the cat in the hat", "choices": ["an ant", "the dog", "a tin"], "answer": 0},
    {"question": "a hen in the den", "choices": ["inn", "then a hat", "the end"], "answer": 2},
    {"question": "ten tins", "choices": ["a tent", "the heat", "in ten"], "answer": 1},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("harness")
    config = run_config(path, max_steps=1)
    train(config, quiet=True)
    finished = FinishedRun.open(config.output)
    perturb(finished.model)
    finished.model.save_pretrained(finished.path / "model")
    return finished


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, kind in (("choose", CHOICE), ("answer", ANSWER)):
        (path / f"{name}.yaml").write_text(TASK.format(name=name, file=file) + kind)
    (path / "gone.yaml").write_text(TASK.format(name="gone", file=path / "gone.jsonl") + CHOICE)
    return path


@torch.no_grad()
def chosen(finished, row):
    """The choice with the highest log-likelihood after the question, by a loop of our own."""
    scores = []
    for choice in row["choices"]:
        question = finished.tokenizer(row["question"])["input_ids"]
        ids = finished.tokenizer(f"{row['question']} {choice}")["input_ids"]
        logits = torch.log_softmax(finished.model(input_ids=torch.tensor([ids])).logits[0], -1)
        scores.append(sum(float(logits[place - 1, ids[place]]) for place in range(len(question), len(ids))))
    return max(range(len(scores)), key=scores.__getitem__)


@pytest.mark.parametrize("mode", ["attached", "detached", "base"])
def test_each_mode_chooses_as_its_own_logits_say(finished, tasks, mode):
    (row,) = evaluate_with_harness(finished, mode, ["choose"], include_path=tasks, batch_size=2)
    with finished.mode(mode):
        expected = [chosen(finished, each) == each["answer"] for each in ROWS]
    assert (row["task"], row["metric"]) == ("choose", "acc")
    assert row["value"] == pytest.approx(sum(expected) / len(expected))
    assert math.isfinite(row["standard_error"])


def test_answers_are_generated(finished, tasks):
    rows = evaluate_with_harness(finished, "attached", ["answer"], limit=2, include_path=tasks)
    assert [row["metric"] for row in rows] == ["exact_match"]


def test_the_harness_opens_our_directory_itself_in_any_mode(finished, tasks):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    arguments = {"pretrained": str(finished.path / "model"), "mode": "detached", "dtype": "float32"}
    found = simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=["choose"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
    )
    (row,) = evaluate_with_harness(finished, "detached", ["choose"], include_path=tasks)
    assert found["results"]["choose"]["acc,none"] == row["value"]


def test_an_unknown_task_is_named(finished, tasks):
    with pytest.raises(DataError, match="no task nowhere"):
        evaluate_with_harness(finished, "attached", ["nowhere"], include_path=tasks)


def test_rows_that_are_not_there_are_one_line(finished, tasks):
    with pytest.raises(DataError, match="cannot run gone"):
        evaluate_with_harness(finished, "attached", ["gone"], include_path=tasks)
