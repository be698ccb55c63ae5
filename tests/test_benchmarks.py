"""Benchmarks still run; what they measure on so little says nothing."""

import sys

import pytest
from launch import launch, need


def test_codec():
    pytest.importorskip("torch")
    run = launch([sys.executable, "-m", "benchmarks.codec", "--values", "8192", "--repeats", "1"], 120)
    assert run.returncode == 0, run.stdout[-8000:]
    assert "Elias and Huffman" in run.stdout


def test_codec_in_a_graph():
    need("tensorflow")
    run = launch([sys.executable, "-m", "benchmarks.tf_graph", "--values", "5001", "--repeats", "2"], 120)
    assert run.returncode == 0, run.stdout[-8000:]
    assert "the same in a tf.function" in run.stdout
