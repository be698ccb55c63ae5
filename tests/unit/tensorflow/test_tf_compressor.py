"""The TensorFlow plug in processes of one rank, each of its own: what they import and how they begin."""

import os
import subprocess
import sys

from launch import need

need("tensorflow")

IMPORTS = "import sys, tensorflow as tf, horovod.tensorflow as hvd, hvd_quant.tensorflow as hq"
REDUCE = "hvd.allreduce(tf.linspace(0.0, 1.0, 2000), compression=hq.QSGDCompressor(bits=8))"


def run(lines):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", f"{IMPORTS}\n{lines}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.stderr + done.stdout


def test_one_rank():
    """By hand; Horovod's optimizers and tapes reduce nothing with one rank."""
    output = run(f"""
try:
    hq.QSGDCompressor().compress(tf.ones(2000))
except Exception as error:
    print(error)
hvd.init()
x = {REDUCE}
print("off by", abs(x - tf.linspace(0.0, 1.0, 2000)).numpy().max())
print("imported torch:", "torch" in sys.modules)
""")
    assert "call hvd.init() before training" in output
    assert float(output.partition("off by ")[2].split()[0]) < 0.01, output
    assert output.strip().endswith("imported torch: False")


def test_graphs_of_tensorflow_1_are_refused():
    assert "graphs of TensorFlow 1" in run(f"tf.compat.v1.disable_eager_execution()\nhvd.init()\n{REDUCE}")


def test_a_class_is_no_compressor():
    output = run("""
import keras, hvd_quant.tensorflow.keras as hqk
hvd.init()
x = tf.zeros(2000)
reduce = lambda: hvd.allreduce(x, compression=hq.QSGDCompressor)
for call in (
    lambda: hqk.DistributedOptimizer(keras.optimizers.SGD(), compression=hq.QSGDCompressor),
    reduce,
    tf.function(reduce),
    lambda: hq.QSGDCompressor.compress(x),
):
    try:
        call()
    except TypeError as error:
        print(error)
print("result", float(hq.QSGDCompressor.compress(hq.QSGDCompressor(), x)[0][-1]))
""")
    says = (
        "compression must be a compressor, not the class QSGDCompressor: make one, as QSGDCompressor(bits=4)"
    )
    assert output.count(says) == 4, output
    assert "result" in output
