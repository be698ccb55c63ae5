#!/usr/bin/env bash
# A container's first process: starts an sshd for the launchers of other nodes, then runs a command.
# Without a command it waits. `keys` as the command makes the cluster's key, which all nodes must share, and ends.
set -euo pipefail

key=$HOME/.ssh/id_rsa # as Kubeflow's MPI operator calls it
if [ ! -e "$key" ]; then
  ssh-keygen -q -t rsa -N '' -C hvd_quant -f "$key"
  cp "$key.pub" "$HOME/.ssh/authorized_keys"
fi
if [ "${1:-}" = keys ]; then exit; fi
/usr/sbin/sshd -f /opt/hvd_quant/docker/sshd_config
if [ $# -eq 0 ]; then exec sleep infinity; fi
exec "$@"
