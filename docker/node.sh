#!/usr/bin/env bash
# A container's first process: starts an sshd for the launchers of other nodes, then runs a command.
# Without a command it waits. `keys` as the command makes the cluster's key, which all nodes must share, and ends.
set -euo pipefail

key=$HOME/.ssh/id_ed25519
make_key() {
  [ -e "$key" ] && return
  ssh-keygen -q -t ed25519 -N '' -C hvd_quant -f "$key"
  cp "$key.pub" "$HOME/.ssh/authorized_keys"
}

make_key
if [ "${1:-}" = keys ]; then exit; fi
/usr/sbin/sshd -p 2222 -h "$key" -o PidFile=none -o UsePAM=no -o PasswordAuthentication=no -o StrictModes=no \
  -o MaxStartups=1000
if [ $# -eq 0 ]; then exec sleep infinity; fi
exec "$@"
