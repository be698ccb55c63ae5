"""Set-up of the tests that every rank runs together; ../test_tensorflow.py starts them."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import horovod.tensorflow as hvd
import pytest
import tensorflow as tf
from shared import start_horovod


@pytest.fixture(scope="session", autouse=True)
def _horovod():
    start_horovod(hvd)
    tf.config.threading.set_intra_op_parallelism_threads(1)


@pytest.fixture(autouse=True)
def _same_start():
    """Every test begins on all ranks together, with the same random numbers."""
    tf.keras.utils.set_random_seed(0)
    hvd.allreduce(tf.zeros(1), name="same_start")
