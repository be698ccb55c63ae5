"""The TensorFlow front end in processes of one rank, each of its own: what they import and how they begin."""

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
print("joined:", int(hvd.join()))
from hvd_quant.tensorflow.join import refuse_join
refuse_join()
print("joined again:", int(hvd.join()))
print("imported torch:", "torch" in sys.modules)
""")
    assert "call hvd.init() before training" in output
    assert float(output.partition("off by ")[2].split()[0]) < 0.01, output
    assert "joined: 0" in output
    assert "joined again: 0" in output
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


def test_overrides_are_checked_when_a_compressor_is_made():
    output = run("""
for overrides in (["dense"], {"dense": 8}, {3: None}, "overrides.txt"):
    try:
        hq.QSGDCompressor(overrides=overrides)
    except (TypeError, ValueError) as error:
        print(error)
from hvd_quant.exchange.cost import Link
options = hq.QSGDCompressor(overrides={"*/bias": None}).options
print("describes", options.describe(Link(1e-3, 1e9))["overrides"])
""")
    for says in (
        "overrides must be a mapping of patterns to schemes",
        "overrides['dense'] must be None or a scheme",
        "a pattern in overrides must be a string",
        "overrides must be in a .yaml, .yml or .toml file",
        "describes [['*/bias', 'None']]",
    ):
        assert says in output, output


def test_overrides_need_names():
    output = run("""
hvd.init()
import gc
c = hq.QSGDCompressor(overrides={"exact": None, "none such": None}, min_numel=10)
x = tf.linspace(0.0, 1.0, 2000)
reduce = lambda: hvd.allreduce(x, compression=c)
for call in (reduce, tf.function(reduce)):
    try:
        call()
    except ValueError as error:
        print("unknown:", error)
for bad in ([(3, x)], [("one", x), ("two", x)]):
    try:
        c.name_gradients(bad)
    except (TypeError, ValueError) as error:
        print("bad:", error)
c.name_gradients([("exact", x)])
print("exact", bool(tf.reduce_all(reduce() == x)))
c.name_gradients([("other", x)])
print("quantized", c.compress(x)[1].group is not None)  # one rank alone has its result as it is
c.reset()
c.name_gradients(iter([("exact", None)]))
print("small", bool(tf.reduce_all(hvd.allreduce(x[:9], compression=c) == x[:9])))
print("left out", c.is_left_out("exact", 10), c.is_left_out("exact", None), c.is_left_out("exact", 9))
print("kept", len(c._names))
del x, bad, call
gc.collect()
print("kept", len(c._names))
""")
    assert output.count("unknown:") == 2, output
    for says in ("tensorflow.DistributedGradientTape", "keras.DistributedOptimizer", "name_gradients"):
        assert output.count(says) >= 2, output
    assert "bad: a gradient's name must be a string, not 3" in output
    assert "bad: one tensor is the gradient of 'one' and of 'two'" in output
    assert output.count("the override of 'none such' holds for no gradient") == 1
    for says in ("exact True", "quantized True", "small True", "left out True True False"):
        assert says in output, output
    assert "kept 1" in output
    assert output.strip().endswith("kept 0"), output


def test_names_of_variables():
    output = run("""
import keras
from hvd_quant.tensorflow.names import variable_name
kernel = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="d")], name="net").weights[0]
print(variable_name(kernel), variable_name(kernel.value), variable_name(tf.Variable(1.0, name="a/b")))
""")
    assert output.strip().endswith("net/d/kernel net/d/kernel a/b"), output


def test_the_tape_is_horovods_own():
    output = run("""
import inspect
hvd.init()
one, two = (inspect.signature(m.DistributedGradientTape).parameters for m in (hvd, hq))
print("same", [(p.name, p.default) for p in one.values()] == [(p.name, p.default) for p in two.values()])
x = tf.Variable(tf.ones(2000), name="x")
for compression in (hvd.Compression.none, hq.QSGDCompressor(), hq.QSGDCompressor(overrides={"x": None})):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(x * x)
    print(float(hq.DistributedGradientTape(tape, compression=compression).gradient(loss, [x])[0][0]))
try:
    hq.DistributedGradientTape(tf.GradientTape(), compression=hq.QSGDCompressor)
except TypeError as error:
    print(error)
""")
    assert "same True" in output, output
    assert output.count("2.0\n") == 3, output
    assert "compression must be a compressor, not the class QSGDCompressor" in output


def test_many_compressors_are_warned_of_once():
    output = run("""
import gc, warnings, weakref
hvd.init()
warnings.simplefilter("always")
for _ in range(30):  # one after the other
    hq.QSGDCompressor()
    gc.collect()
print("none so far")
kept = [hq.QSGDCompressor() for _ in range(30)]
one = weakref.ref(kept[0])
del kept
gc.collect()
print("gone", one() is None)
""")
    says = "10 compressors are in memory by now: make a compressor once, outside of the step"
    _, _, after = output.partition("none so far")
    assert output.count("in memory by now") == 1, output
    assert says in output  # on stderr, which comes first
    assert "gone True" in after
