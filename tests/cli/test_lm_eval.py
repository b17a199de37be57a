import json

from shadowtune.cli.main import main

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def test_each_mode_of_a_run_is_a_row(shadow_run, tmp_path):
    file, target = tmp_path / "rows.jsonl", tmp_path / "out.json"
    file.write_text(json.dumps({"question": "the cat", "choices": ["in", "on"], "answer": 0}) + "\n")
    (tmp_path / "letters.yaml").write_text(TASK.format(file=file))
    options = ["--tasks", "letters", "--include-path", str(tmp_path), "--json", str(target)]
    assert main(["lm-eval", str(shadow_run), *options]) == 0
    rows = json.loads(target.read_text())["rows"]
    assert [(row["mode"], row["task"], row["metric"]) for row in rows] == [
        (mode, "letters", "acc") for mode in ("attached", "detached", "base")
    ]
    assert {row["value"] for row in rows} <= {0.0, 1.0}


def test_an_unknown_task_is_one_line(shadow_run, capsys):
    assert main(["lm-eval", str(shadow_run), "--tasks", "nowhere", "--mode", "base"]) == 2
    assert "no task nowhere" in capsys.readouterr().err
