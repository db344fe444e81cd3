#!/usr/bin/env bash
# This node's address, as the other nodes reach it.
set -euo pipefail
if [ -n "${NETWORK_INTERFACE:-}" ]; then
  ip -4 -o address show dev "$NETWORK_INTERFACE" | awk '{ sub("/.*", "", $4); print $4; exit }'
else
  hostname -I | cut -d' ' -f1
fi
