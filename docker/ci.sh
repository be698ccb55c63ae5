#!/usr/bin/env bash
# The whole CI in Docker: builds the CPU image, runs all tests in it, then trains on two nodes under both controllers.
# Arguments are handed to pytest.
#
# Environment:
#   BUILD_ARGS   more arguments of docker build, e.g. "--network host --secret id=ca,src=/etc/ssl/bundle.pem"
#   IMAGE        what to call the image (default: hvd-quant:cpu)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export IMAGE=${IMAGE:-hvd-quant:cpu} DOCKER_BUILDKIT=1
read -ra build_args <<<"${BUILD_ARGS:-}"

if docker compose version >/dev/null 2>&1; then
  compose=(docker compose)
elif command -v docker-compose >/dev/null; then
  compose=(docker-compose)
else
  echo "ci: there is neither docker compose nor docker-compose" >&2
  exit 1
fi
compose+=(--project-name hvd-quant-ci --file docker/compose.yaml)

step() { printf '\n== %s (%d s so far)\n' "$*" "$SECONDS"; }

step "docker build"
docker build --progress plain "${build_args[@]}" -f docker/Dockerfile.cpu -t "$IMAGE" .
docker image inspect --format 'size: {{.Size}} bytes' "$IMAGE"

step "the tests in the image"
docker run --rm --init --shm-size=1g "$IMAGE" scripts/test.sh "$@"

down() { "${compose[@]}" down --volumes --remove-orphans >/dev/null 2>&1 || true; }
trap down EXIT
for controller in mpi gloo; do
  step "two nodes, $controller"
  down
  log=$(mktemp)
  CONTROLLER=$controller "${compose[@]}" run --rm --use-aliases -T node0 | tee "$log"
  grep -q 'parameters are bit-identical on all 4 ranks' "$log" || { echo "ci: the replicas did not agree" >&2 && exit 1; }
  rm -f "$log"
done
step "done"
