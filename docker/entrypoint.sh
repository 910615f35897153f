#!/bin/sh
# What a container of the image does, as FEDLOOM_ROLE says: a Ray head, a Ray worker, the MLflow server, or, without a
# role, the command line. Further arguments go to the program that is started.
set -eu

case ${FEDLOOM_ROLE:-} in
  "")
    exec fedloom "$@"
    ;;
  head)
    exec ray start --head --block --port "${RAY_PORT:-6379}" --dashboard-host "${RAY_DASHBOARD_HOST:-0.0.0.0}" \
      --dashboard-port "${RAY_DASHBOARD_PORT:-8265}" --disable-usage-stats "$@"
    ;;
  worker)
    exec ray start --address "${RAY_HEAD:-head:6379}" --block --disable-usage-stats "$@"
    ;;
  mlflow)
    # The database's URI holds a password: MLflow reads MLFLOW_BACKEND_STORE_URI, and it stays off the command line.
    : "${MLFLOW_BACKEND_STORE_URI:?give the database, e.g. postgresql+psycopg://fedloom:PASSWORD@postgres/fedloom}"
    : "${MLFLOW_ARTIFACTS_DESTINATION:?give the place of files, e.g. a mounted folder or s3://bucket/fedloom}"
    export MLFLOW_DISABLE_TELEMETRY="${MLFLOW_DISABLE_TELEMETRY:-true}"
    export MLFLOW_SERVER_ENABLE_JOB_EXECUTION="${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:-false}"
    exec mlflow server --host "${MLFLOW_HOST:-0.0.0.0}" --port "${MLFLOW_PORT:-5000}" --workers "${MLFLOW_WORKERS:-1}" "$@"
    ;;
  *)
    echo "FEDLOOM_ROLE=$FEDLOOM_ROLE is none of head, worker, mlflow and nothing" >&2
    exit 2
    ;;
esac
