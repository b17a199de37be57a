import sys

import pytest
import torch

from shadowtune.benchmark import memory
from shadowtune.benchmark.memory import MemoryMeter

SIZE = 256 * 2**20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak can be reset on Linux only")


@linux
def test_the_peak_is_counted_anew_after_a_restart():
    meter = MemoryMeter(torch.device("cpu"))
    meter.restart()
    before = meter.current_mb()
    block = torch.ones(SIZE // 4)
    assert meter.current_mb() - before == pytest.approx(256, abs=16)
    del block
    assert meter.current_mb() - before == pytest.approx(0, abs=16)
    assert meter.peak_mb() - before == pytest.approx(256, abs=16)
    meter.restart()
    assert meter.peak_mb() - before == pytest.approx(0, abs=16)


@linux
def test_what_is_freed_in_small_pieces_is_given_back():
    meter = MemoryMeter(torch.device("cpu"))
    blocks = [torch.ones(2**12) for _ in range(2**13)]  # 16 kB each: the allocator keeps such pieces
    wall = torch.ones(2**12)
    held = meter.current_mb()
    del blocks
    meter.give_back()
    assert held - meter.current_mb() > 64
    assert wall.sum() == 2**12


def test_where_the_system_does_not_tell_the_peak_of_the_process_serves(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "none")
    meter = MemoryMeter(torch.device("cpu"))
    meter.restart()
    assert meter.peak_mb() >= 1
    assert meter.current_mb() >= 1
