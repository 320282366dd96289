#!/bin/bash
# Prepares a node: installs mlprune from ~/mlprune into an environment, unless it is installed, and sets the variables
# that mlprune, Ray and MLflow need in every shell. It can be run repeatedly.
#   bash ~/mlprune/cluster/node-setup.sh [FOLDER OF THE ENVIRONMENT, by default ~/mlprune-env]
set -eu
env=${1:-$HOME/mlprune-env}

if [ ! -x "$env/bin/mlprune" ]; then
    python3 -m venv "$env"
    # editable, so that files copied by a later `ray up` take effect
    "$env/bin/pip" install -c ~/mlprune/constraints.txt -e ~/mlprune
fi

cat >~/.mlprune.sh <<END
export PATH="$env/bin:\$PATH"
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
export RAY_ENABLE_ZERO_COPY_TORCH_TENSORS=1
export OMP_WAIT_POLICY=PASSIVE
export MLFLOW_TRACKING_URI=http://127.0.0.1:5000
END

# The line is added twice: at the top, because start-up files often return early in non-interactive shells
# (`ssh NODE COMMAND`); at the end, so that another Python that the file adds to PATH (conda, pyenv) does not come first.
line='. ~/.mlprune.sh'
touch ~/.bashrc
if ! grep -qxF "$line" ~/.bashrc; then
    { echo "$line"; cat ~/.bashrc; echo "$line"; } >~/.bashrc.new
    cat ~/.bashrc.new >~/.bashrc
    rm ~/.bashrc.new
fi
