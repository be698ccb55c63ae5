"""Benchmarks still run; what they measure on so little says nothing."""

import json
import sys

import pytest
from launch import ROOT, launch, need


def test_codec():
    pytest.importorskip("torch")
    run = launch([sys.executable, "-m", "benchmarks.codec", "--values", "8192", "--repeats", "1"], 120)
    assert run.returncode == 0, run.stdout[-8000:]
    assert "Elias and Huffman" in run.stdout


def test_gpu_check(tmp_path):
    """All of it that can run without a GPU."""
    need("torch")
    script = ROOT / "scripts" / "gpu_check.sh"
    run = launch(["bash", script, tmp_path], 300, HVD_QUANT_CHECK_DEVICE="cpu", PYTHON=sys.executable)
    assert run.returncode == 0, run.stdout[-8000:]
    assert run.stdout.count("all passed") == 2  # ranks
    assert "check_payloads passed" in run.stdout
    assert json.loads((tmp_path / "speed.json").read_text())["rows"]


def test_codec_in_a_graph():
    need("tensorflow")
    run = launch([sys.executable, "-m", "benchmarks.tf_graph", "--values", "5001", "--repeats", "2"], 120)
    assert run.returncode == 0, run.stdout[-8000:]
    assert "the same in a tf.function" in run.stdout
