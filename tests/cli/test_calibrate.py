import json

import pytest

from shadowtune.cli.main import main
from shadowtune.config.serving import PolicyConfig
from tests.support.commands import WORDS, write_rows


@pytest.fixture
def held_out(tmp_path):
    return write_rows(tmp_path / "held-out.jsonl", [{"prompt": f"say {word}", "completion": word} for word in WORDS])


@pytest.fixture
def small(shadow_run, tmp_path):
    assert main(["detach", str(shadow_run), "--out", str(tmp_path / "small")]) == 0
    return tmp_path / "small"


def calibrate(edge, held_out, out, *more):
    command = ["calibrate", str(edge), "--data", str(held_out), "-o", str(out), "--quiet", "--minimum", "0"]
    return main([*command, *map(str, more)])


def test_a_run_is_calibrated_against_itself_and_the_policy_can_be_loaded(shadow_run, held_out, tmp_path, capsys):
    out, report = tmp_path / "policy.json", tmp_path / "report.json"
    more = ("--cloud-run", shadow_run, "--deferral-rate", 0.5, "--price-request", 3, "--json", report)
    assert calibrate(shadow_run, held_out, out, *more) == 0
    policy = PolicyConfig.load(out)
    assert policy.kind == "confidence"
    assert policy.prices.request == 3
    assert policy.curve[-1].deferral_rate == 1
    assert policy.curve[-1].cost > 3
    assert (tmp_path / "policy.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads(report.read_text())
    assert [row[""] for row in told["rows"]] == ["edge alone", "promised", "found", "cloud alone"]
    assert told["rows"][1]["deferral rate"] <= 0.5
    assert {row["router"] for row in told["qualities"]} >= {"logprob", "learned", "random", "oracle"}
    assert PolicyConfig(threshold=told["policy"]["threshold"]).threshold == policy.threshold
    said = capsys.readouterr()
    assert "promised" in said.out
    assert "95 % interval, 4 examples" in said.err


def test_a_detached_directory_gives_what_its_run_gives(shadow_run, small, held_out, tmp_path):
    policies = []
    for name, edge in (("a", shadow_run), ("b", small)):
        more = ("--cloud-run", shadow_run, "--deferral-rate", 1, "--signal", "entropy")
        assert calibrate(edge, held_out, tmp_path / f"{name}.json", *more) == 0
        policies.append(PolicyConfig.load(tmp_path / f"{name}.json"))
    assert [point.threshold for point in policies[0].curve] == pytest.approx(
        [point.threshold for point in policies[1].curve], abs=1e-4
    )


def test_kept_answers_are_not_asked_for_again(shadow_run, held_out, tmp_path, monkeypatch):
    from shadowtune.cli import answers

    more = ("--cloud-run", shadow_run, "--deferral-rate", 1, "--answers", tmp_path / "answers")
    assert calibrate(shadow_run, held_out, tmp_path / "a.json", *more) == 0
    monkeypatch.setattr(answers, "_record", None)
    assert calibrate(shadow_run, held_out, tmp_path / "b.json", *more) == 0
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


def test_an_aim_out_of_reach_writes_nothing_and_says_what_can_be_had(shadow_run, held_out, tmp_path, capsys):
    out = tmp_path / "policy.json"
    nonsense = write_rows(tmp_path / "other.jsonl", [{"prompt": "say", "completion": "never said"}] * 4)
    assert calibrate(shadow_run, nonsense, out, "--cloud-run", shadow_run, "--accuracy", 0.9) == 2
    assert "no threshold reaches accuracy 0.9: the best is 0.0000" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--accuracy", "1.5"], "--accuracy must be 0 to 1, got 1.5"),
        (["--deferral-rate", "-1"], "--deferral-rate must be 0 to 1"),
        (["--cost", "nan"], "--cost must be at least 0"),
        (["--accuracy", "0.5", "--price-prompt", "-1"], "prompt must be at least 0"),
        (["--accuracy", "0.5", "-o", "DIR"], "must name a file that ends in .json"),
        (["--accuracy", "0.5", "-o", "DIR/none/policy.json"], "is not a writable directory"),
        (["--accuracy", "0.5", "--limit", "0"], "limit"),
        (["--accuracy-loss", "0"], "--accuracy-loss must be above 0 and below 1"),
        (["--accuracy-loss", "0.1", "--guarantee", "1"], "--guarantee must be at least 0.5 and below 1"),
        (["--accuracy-loss", "0.01"], "598 examples in all would suffice"),
        (["--accuracy", "0.5", "--minimum", "5"], "examples would suffice"),
        (["--accuracy", "0.5", "--signal", "agreement"], "needs a deferral head"),
    ],
)
def test_what_is_wrong_is_one_line_before_any_work(shadow_run, held_out, tmp_path, more, said, capsys):
    words = [word.replace("DIR", str(tmp_path)) for word in more]
    assert calibrate(shadow_run, held_out, tmp_path / "policy.json", "--cloud-run", shadow_run, *words) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_cloud_that_is_not_there_is_one_line(shadow_run, held_out, tmp_path, capsys):
    more = ("--cloud", "http://127.0.0.1:9", "--cloud-model", "m", "--accuracy", 0.5)
    assert calibrate(shadow_run, held_out, tmp_path / "policy.json", *more) == 2
    assert "cloud unreachable" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "more", [["--accuracy", "1"], ["--cloud-run", "x"], ["--cloud-run", "x", "--cost", "1", "--deferral-rate", "1"]]
)
def test_one_cloud_and_one_aim_must_be_named(more):
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", "edge", "-o", "p.json", *more])
    assert stopped.value.code == 2


def test_the_old_name_of_the_deferral_rate_is_read_with_a_warning(shadow_run, held_out, tmp_path):
    out = tmp_path / "policy.json"
    with pytest.warns(FutureWarning, match="--hand-over is now called --deferral-rate"):
        assert calibrate(shadow_run, held_out, out, "--cloud-run", shadow_run, "--hand-over", 0.5) == 0
    assert PolicyConfig.load(out).curve
