"""horovodrun, but for one question: whether Horovod was built with MPI or Gloo.

To answer that it imports TensorFlow in a process of its own, 3 s in each launch. Here the answer is yes; if
it is no, the ranks say so.
"""

import sys

from horovod.common import util

util.mpi_built = util.gloo_built = lambda verbose=False: True

from horovod.runner.launch import run_commandline  # noqa: E402  it imports the functions above by name

if __name__ == "__main__":
    sys.exit(run_commandline())
