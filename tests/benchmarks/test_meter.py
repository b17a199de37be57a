import sys

import pytest
import torch

from benchmarks import measurement
from benchmarks.measurement import MemoryMeter

SIZE = 256 * 2**20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak can be reset on Linux only")


@linux
def test_the_peak_is_counted_anew_after_a_restart():
    own = MemoryMeter(torch.device("cpu"))
    own.restart()
    before = own.current_mb()
    block = torch.ones(SIZE // 4)
    assert own.current_mb() - before == pytest.approx(256, abs=16)
    del block
    own.release()  # a library in this process may have told the allocator to keep large blocks
    assert own.current_mb() - before == pytest.approx(0, abs=16)
    assert own.peak_mb() - before == pytest.approx(256, abs=16)
    own.restart()
    assert own.peak_mb() - before == pytest.approx(0, abs=16)


@linux
def test_what_is_freed_in_small_pieces_is_given_back():
    own = MemoryMeter(torch.device("cpu"))
    blocks = [torch.ones(2**12) for _ in range(2**13)]  # 16 kB each: the allocator keeps such pieces
    wall = torch.ones(2**12)
    held = own.current_mb()
    del blocks
    own.release()
    assert held - own.current_mb() > 64
    assert wall.sum() == 2**12


def test_where_the_system_does_not_tell_the_peak_of_the_process_serves(monkeypatch, tmp_path):
    monkeypatch.setattr(measurement, "STATUS", tmp_path / "none")
    monkeypatch.setattr(measurement, "CLEAR_REFS", tmp_path / "none")
    own = MemoryMeter(torch.device("cpu"))
    own.restart()
    assert own.peak_mb() >= 1
    assert own.current_mb() >= 1
