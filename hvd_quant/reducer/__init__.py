"""What every front end needs between the gradients that it is handed and the exchange.

Nothing here imports a framework or Horovod.
"""
