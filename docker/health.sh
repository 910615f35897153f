#!/bin/sh
# Whether a container of the image does what its FEDLOOM_ROLE says. A run, which has no role, is well while it lives.
set -eu

ask() { # asks this container's own server
  wget --quiet --tries 1 --timeout 5 --output-document - "http://127.0.0.1:$1"
}

case ${FEDLOOM_ROLE:-} in
  head)
    ask "${RAY_AGENT_PORT:-52365}/api/local_raylet_healthz"
    ask "${RAY_DASHBOARD_PORT:-8265}/api/gcs_healthz"
    ;;
  worker) ask "${RAY_AGENT_PORT:-52365}/api/local_raylet_healthz" ;;
  mlflow) ask "${MLFLOW_PORT:-5000}/health" ;;
esac
