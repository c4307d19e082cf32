"""The bench command on real bags, where there are any.

``MILKERNELS_TEST_DATA`` names the folder with ``musk2.npz``; else ``shared/data/mil`` beside the checkout is tried.
"""

import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("psutil")

from milkernels.bench import cli
from milkernels.bench.workload import fast_dtypes

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data" / "mil"
MUSK2 = Path(os.environ.get("MILKERNELS_TEST_DATA", BESIDE)) / "musk2.npz"


@pytest.mark.skipif(not MUSK2.is_file(), reason="no musk2.npz: MILKERNELS_TEST_DATA names no folder that has it")
@pytest.mark.parametrize("op", ["gated_attention_pool", "attention_scores"])
def test_bench_on_musk2(op, tmp_path):
    path = tmp_path / "musk2.json"
    threads = torch.get_num_threads()
    arguments = ["--op", op, "--features", str(MUSK2), "--hidden", "64", "--mode", "step", "--rounds", "1"]
    try:
        # One thread: these bags are small, and eager's threads would mostly wait for each other.
        code = cli.main([*arguments, "--threads", "1", "--contenders", "eager", "--no-memory", "--json", str(path)])
    finally:
        torch.set_num_threads(threads)
    units = json.loads(path.read_text())["units"]
    rows = [row for unit in units for row in unit["rows"]]
    assert code == 0, [row["reason"] for row in rows]
    assert [unit["dtype"] for unit in units] == fast_dtypes()
    for unit in units:
        shape = unit["workload"]["shape"]
        assert len(shape["lengths"]) == 102 and sum(shape["lengths"]) == 6598 and shape["dim"] == 166
        assert (min(shape["lengths"]), max(shape["lengths"])) == (1, 1044)
    assert {row["status"] for row in rows} == {"ok"}
