"""The common part of the front ends, between their gradients and the exchange.

Nothing here imports a framework or Horovod.
"""
