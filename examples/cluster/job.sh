#!/usr/bin/env bash
# One analysis with ray job submit: job.sh RUN OUT. Both are on storage that every node sees.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
# The same in the shell that started the head, with the same token (~/.ray/auth_token).
export RAY_AUTH_MODE=token
exec ray job submit --address "${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" \
  --working-dir "$here/code" --runtime-env "$here/runtime_env.yaml" -- \
  lcray analyze "$1" --task mytask:task --out "$2"
