"""What the multi-rank tests of TensorFlow share."""

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

import hvd_quant.tensorflow as hq


def gathered(value):
    """Every rank's value, in rank order."""
    return hvd.allgather_object(value, name="gathered")


def same_everywhere(*tensors):
    """Whether all ranks hold the same bits."""
    return len(set(gathered(b"".join(np.asarray(tensor).tobytes() for tensor in tensors)))) == 1


def own_randn(*shape, seed=0, dtype=tf.float32):
    """Random numbers that differ from rank to rank."""
    return tf.cast(tf.random.stateless_normal(shape, [seed, 100 + hvd.rank()]), dtype)


def exact_mean(tensor):
    return np.mean([np.asarray(one, np.float64) for one in gathered(tensor.numpy())], axis=0)


def same_mismatch(error):
    """The text of a RankMismatchError, which all ranks must have."""
    assert isinstance(error, hq.RankMismatchError), repr(error)
    assert len(set(gathered(str(error)))) == 1
    return str(error)


class Mlp:
    """A small model, the same on every rank, with weights above and biases below the default min_numel."""

    def __init__(self, width=64):
        shapes = [(32, width), (width,), (width, 32), (32,)]
        self.variables = [
            tf.Variable(0.2 * tf.random.stateless_normal(shape, [i, 7])) for i, shape in enumerate(shapes)
        ]

    def __call__(self, x):
        w1, b1, w2, b2 = self.variables
        return tf.nn.tanh(x @ w1 + b1) @ w2 + b2

    def gradients(self, compression, seed, extra=lambda variables: 0.0, **options):
        """Of a loss on this rank's own data, reduced by Horovod's tape."""
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self(own_randn(16, 32, seed=seed)) ** 2) + extra(self.variables)
        tape = hvd.DistributedGradientTape(tape, compression=compression, **options)
        return tape.gradient(loss, self.variables)

    def local_gradients(self, seed):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self(own_randn(16, 32, seed=seed)) ** 2)
        return tape.gradient(loss, self.variables)

    def step_function(self, compression, **options):
        """A traced training step; returns the reduced gradients."""

        @tf.function
        def step(seed):
            gradients = self.gradients(compression, seed, **options)
            for variable, gradient in zip(self.variables, gradients, strict=True):
                variable.assign_sub(0.1 * gradient)
            return gradients

        return step
