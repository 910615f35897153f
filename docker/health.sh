#!/bin/sh
# Whether a container of the image does what its FEDLOOM_ROLE says. A run, which has no role, is well while it lives.
set -eu

case ${FEDLOOM_ROLE:-} in
  head) exec ray health-check --address "127.0.0.1:${RAY_PORT:-6379}" ;;
  worker) exec ray health-check --address "${RAY_HEAD:-head:6379}" ;;
  mlflow) exec wget --quiet --tries 1 --timeout 5 --output-document - "http://127.0.0.1:${MLFLOW_PORT:-5000}/health" ;;
esac
