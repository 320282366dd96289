#!/bin/bash
# Starts the MLflow server on the head, on loopback only, unless one already runs. Its database and artifacts are in
# ~/mlflow. It keeps running after the ssh session and after `ray stop`. To stop it: pkill -f 'mlflow server'
set -eu
up() { (exec 3<>/dev/tcp/127.0.0.1/5000) 2>/dev/null; }

up && exit
mkdir -p ~/mlflow
# without MLflow's background jobs, which take 1.5 GB and are not used here
MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true setsid nohup mlflow server \
    --host 127.0.0.1 --port 5000 --workers 1 \
    --backend-store-uri "sqlite:///$HOME/mlflow/mlflow.db" --artifacts-destination "$HOME/mlflow/artifacts" \
    </dev/null >>~/mlflow/server.log 2>&1 &
for _ in $(seq 120); do
    up && exit
    kill -0 $! || break
    sleep 0.5
done
echo "the MLflow server does not answer at 127.0.0.1:5000; see ~/mlflow/server.log:" >&2
tail -n 20 ~/mlflow/server.log >&2
exit 1
