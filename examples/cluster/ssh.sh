#!/usr/bin/env bash
# Hosts that can ssh to each other without a password, with the repository at the same path on each.
#
#   HOSTS=node0:4,node1:4 NIC=eth0 examples/cluster/ssh.sh --compression qsgd --bits 4
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
hosts=${HOSTS:?hosts and the ranks on each, such as node0:4,node1:4}
ranks=$(awk -F '[:,]' '{ for (i = 2; i <= NF; i += 2) n += $i; print n }' <<<"$hosts")

# The line that differs from one machine: -H, and the interface's name, where hosts have several.
exec "$root/.venv/bin/horovodrun" -np "$ranks" -H "$hosts" ${NIC:+--network-interface "$NIC"} \
  "$root/.venv/bin/python" "$root/examples/torch_fashion_mnist.py" "$@"
