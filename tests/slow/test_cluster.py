"""A whole comparison whose runs are jobs of submitit's local scheduler: the results are those of local processes."""

import pytest

from shadowtune.comparison.plan import Plan
from shadowtune.comparison.run import compare
from tests.support.comparisons import compare_config

pytestmark = pytest.mark.slow


def test_runs_in_a_scheduler_equal_runs_on_this_machine(tmp_path):
    pytest.importorskip("submitit")
    here = compare(Plan.of(compare_config(tmp_path)))
    cluster = {"scheduler": "local", "gpus_per_run": 0, "cpus_per_run": 1}
    there = compare(Plan.of(compare_config(tmp_path, output=str(tmp_path / "there"), cluster=cluster, jobs=2)))
    assert [row["error"] for row in there.rows] == [None] * 3

    def measured(results):
        return [(row["run"], [(each["mode"], each["loss"]) for each in row["evaluations"]]) for row in results.rows]

    assert measured(there) == measured(here)
