"""Files as users have them, each trained for two steps without an edit."""

import csv
import json

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from shadowtune.config.shadow import ShadowConfig
from shadowtune.config.training import DataConfig, OptimizerConfig, TrainConfig
from shadowtune.errors import ConfigError, DataError
from shadowtune.evaluation.run import FinishedRun
from shadowtune.training.run import train
from shadowtune.training.training_data import load_training_data
from tests.support.bases import tiny_base
from tests.support.chats import QWEN3, chat_tokenizer
from tests.support.runs import model_directory

PAIRS = [{"prompt": f"say {word}", "completion": word} for word in ("one", "two", "ten", "red", "sea", "day")]
ALPACA = [{"instruction": "say it", "input": row["completion"], "output": row["completion"]} for row in PAIRS]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": row["prompt"]}, {"from": "gpt", "value": row["completion"]}]}
    for row in PAIRS
]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": row["prompt"]}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "blue"},
            {"role": "assistant", "content": row["completion"]},
        ],
        "tools": [TOOL],
    }
    for row in PAIRS
]
DPO = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in PAIRS]


def table(delimiter):
    def write(path):
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, PAIRS[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(PAIRS)

    return write


def arrow(path):
    directory = path.with_name("saved")
    datasets.Dataset.from_list(PAIRS).save_to_disk(str(directory))
    next(directory.glob("*.arrow")).rename(path)


def lines(rows):
    return lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def array(rows):
    return lambda path: path.write_text(json.dumps(rows, indent=1))


FILES = {
    "rows.csv": (table(","), "prompt and completion: 6 examples"),
    "rows.tsv": (table("\t"), "prompt and completion: 6 examples"),
    "rows.parquet": (
        lambda path: datasets.Dataset.from_list(PAIRS).to_parquet(str(path)),
        "prompt and completion: 6 examples",
    ),
    "rows.json": (array(PAIRS), "prompt and completion: 6 examples"),
    "saved": (
        lambda path: datasets.Dataset.from_list(PAIRS).save_to_disk(str(path)),
        "prompt and completion: 6 examples",
    ),
    "rows.arrow": (arrow, "prompt and completion: 6 examples"),
    "alpaca.json": (array(ALPACA), "Alpaca: 6 examples"),
    "alpaca.jsonl": (lines(ALPACA), "Alpaca: 6 examples"),
    "sharegpt.json": (array(SHAREGPT), "ShareGPT: 6 conversations"),
    "sharegpt.jsonl": (lines(SHAREGPT), "ShareGPT: 6 conversations"),
    "tools.jsonl": (lines(TOOLS), "chat messages: 6 conversations"),
    "dpo.jsonl": (lines(DPO), "preferences, of which the chosen answers are learned (for DPO use TRL): 6 pairs"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_base(max_position_embeddings=512).save_pretrained(path)
    chat_tokenizer(QWEN3).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return model_directory(tmp_path_factory.mktemp("classifier"), "classification")


def config(tmp_path, base, train, **settings):
    data = settings.pop("data", {})
    common = {
        "model": base,
        "output": str(tmp_path / "run"),
        "shadow": ShadowConfig(rank=4, update_width=3),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
    }
    return TrainConfig(data=DataConfig(train=train, **data), **{**common, **settings})


@pytest.mark.parametrize("name", FILES)
def test_a_common_file_is_trained_without_an_edit(tmp_path, base, name):
    write, formats = FILES[name]
    write(tmp_path / name)
    said = []
    summary = train(config(tmp_path, base, str(tmp_path / name)), report=said.append, quiet=True)
    assert summary.steps == 2
    assert said[0] == f"read as {formats}"
    assert not any("warning" in line for line in said)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_several_sources_have_weights_and_a_share_of_all_is_held_out(tmp_path, base):
    lines(PAIRS)(tmp_path / "a.jsonl")
    lines(ALPACA[:4])(tmp_path / "b.jsonl")
    sources = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    data = load_training_data(config(tmp_path, base, sources, data={"weights": (2, 0.5)}))
    assert (len(data.train), data.formats) == (14, "prompt and completion: 12 examples; Alpaca: 2 examples")
    data = load_training_data(config(tmp_path, base, sources, data={"validation": "30%"}))
    assert (len(data.train), len(data.validation)) == (7, 3)
    assert data.formats.endswith(", 3 hold-out")
    with pytest.raises(ConfigError, match="weights has 1 numbers for the 2 data sets"):
        config(tmp_path, base, sources, data={"weights": (2,)})


def test_columns_of_any_name_are_mapped(tmp_path, base):
    path = tmp_path / "a.csv"
    path.write_text("question,answer,note\nsay one,one,x\n")
    columns = {"prompt": "question", "completion": "answer"}
    data = load_training_data(config(tmp_path, base, str(path), data={"columns": columns}))
    assert (data.formats, data.unread) == ("prompt and completion: 1 examples", ("note",))
    with pytest.raises(
        DataError, match=r"a\.csv: no column 'questoin' \(did you mean question\?\) for data\.columns\.p"
    ):
        load_training_data(config(tmp_path, base, str(path), data={"columns": {**columns, "prompt": "questoin"}}))
    with pytest.raises(ConfigError, match=r"columns has promt \(did you mean prompt\?\)"):
        config(tmp_path, base, str(path), data={"columns": {"promt": "question"}})


LABELLED = "text,label\nsay one,billing\nsay two,other\nsay ten,billing\nsay red,account\n"


def test_text_and_label_are_learned_as_answers_by_default(tmp_path, base):
    (tmp_path / "a.csv").write_text(LABELLED)
    data = load_training_data(config(tmp_path, base, str(tmp_path / "a.csv")))
    assert data.formats == "text and label (learned as answers): 4 examples"
    assert data.tokenizer.decode(data.train[0]["input_ids"]).endswith("billing<|im_end|>")


@pytest.mark.parametrize("method", ["shadow", "lora"])
def test_class_names_travel_to_every_form_of_the_classifier(tmp_path, classifier, method):
    (tmp_path / "a.csv").write_text(LABELLED)
    settings = config(
        tmp_path, classifier, str(tmp_path / "a.csv"), task="classification", method=method, class_weights="balanced"
    )
    said = []
    train(settings, report=said.append, quiet=True)
    assert said[0] == "read as texts with labels: 4 examples, 3 classes (account, billing, other)"
    run = FinishedRun.open(settings.output)
    names = {0: "account", 1: "billing", 2: "other"}
    assert run.model.config.id2label == names
    (tmp_path / "test.csv").write_text("text,label\nsay two,other\nsay red,account\n")
    for mode in run.modes:
        result = run.evaluate(mode, str(tmp_path / "test.csv"))
        assert set(result.predictions) <= {*names.values()}
        assert result.accuracy == sum(map(str.__eq__, result.predictions, ["other", "account"])) / 2
    (tmp_path / "test.csv").write_text("text,label\nsay two,oter\n")
    with pytest.raises(DataError, match=r"line 2: the label 'oter' is none of the 3 classes.*did you mean other"):
        run.evaluate("attached", str(tmp_path / "test.csv"))
    if method == "shadow":
        run.model.detached().save_pretrained(tmp_path / "plain")
        assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").config.id2label == names


@pytest.mark.parametrize("method", ["shadow", "lora"])
@pytest.mark.parametrize(
    ("labels", "kind", "width"),
    [
        ([["x"], ["y", "x"], [], ["z"]], "multi_label_classification", 3),
        ([0.5, 1.5, 2.0, 1.0], "regression", 1),
    ],
    ids=["multi", "regression"],
)
def test_several_classes_and_numbers_are_trained_and_evaluated(tmp_path, classifier, method, labels, kind, width):
    rows = [{"text": row["prompt"], "label": label} for row, label in zip(PAIRS, labels, strict=False)]
    lines(rows)(tmp_path / "a.jsonl")
    settings = config(tmp_path, classifier, str(tmp_path / "a.jsonl"), task="classification", method=method)
    assert train(settings, quiet=True).final_loss > 0
    run = FinishedRun.open(settings.output)
    assert (run.model.config.problem_type, run.model.config.num_labels) == (kind, width)
    result = run.evaluate("attached", str(tmp_path / "a.jsonl"))
    assert result.other_scores.keys() == ({"f1"} if width == 3 else {"mean_absolute_error"})
    encoded = run.dataset.encode(rows, run.tokenizer, classify=True)[0]
    with run.mode("attached") as model, torch.inference_mode():
        logits = [model(torch.tensor([each["input_ids"]])).logits[0] for each in encoded]
    targets = [torch.tensor(each["labels"]).float().view(-1) for each in encoded]
    loss = torch.nn.functional.mse_loss if width == 1 else torch.nn.functional.binary_cross_entropy_with_logits
    assert result.loss == pytest.approx(float(loss(torch.stack(logits).float(), torch.stack(targets))), rel=1e-4)


def test_class_weights_scale_the_loss_of_their_class(tmp_path, classifier):
    (tmp_path / "a.csv").write_text(LABELLED)
    losses = {}
    for weights in (None, {"billing": 3.0, "other": 3.0, "account": 3.0}, {"other": 5.0}):
        settings = config(tmp_path, classifier, str(tmp_path / "a.csv"), task="classification", class_weights=weights)
        train(settings, overwrite=True, quiet=True)
        metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        losses[str(weights)] = json.loads(metrics[0])["loss"]
    plain, tripled, other = losses.values()
    assert tripled == pytest.approx(3 * plain, rel=1e-4)
    assert plain < other < 5 * plain
    with pytest.raises(ConfigError, match="class_weights are for task=classification"):
        config(tmp_path, classifier, "a.csv", class_weights="balanced")
