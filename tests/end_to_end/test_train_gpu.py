"""The GPU benchmark, small and on the CPU: the models it measures are those it predicts."""

from pathlib import Path

import pytest


@pytest.fixture
def train_gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    import train_gpu

    return train_gpu


@pytest.mark.parametrize("method", ["loram", "qlora", "qloram"])
def test_a_case_trains_the_model_that_is_predicted(train_gpu, method):
    case = next(case for case in train_gpu.CASES if case.method == method)
    found = train_gpu.measure(train_gpu.in_tiny(case), 1, tiny=True)
    rotary = 2 * train_gpu.TINY["head_dim"] // 2 * 4  # frequencies twice, float32
    assert found["weight_bytes"] - rotary == found["predicted_weight_bytes"]
    assert (found["outcome"], found["peak_allocated_bytes"]) == ("ok", "")
    assert found["tokens_per_second"] > 0
