#!/bin/bash
# Makes a node ready: installs mlprune from ~/mlprune into an environment, unless it is there, and puts what mlprune,
# Ray and MLflow need into every shell's environment. Run it as often as you like.
#   bash ~/mlprune/cluster/node-setup.sh [FOLDER OF THE ENVIRONMENT; ~/mlprune-env if not said]
set -eu
env=${1:-$HOME/mlprune-env}

if [ ! -x "$env/bin/mlprune" ]; then
    python3 -m venv "$env"
    # editable: files that a later `ray up` brings are what then runs
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

# Twice: at the top, because a start-up file often returns early where nobody types (`ssh NODE COMMAND`); at the end,
# so that no other Python that the file puts on PATH (conda, pyenv) comes before ours.
line='. ~/.mlprune.sh'
touch ~/.bashrc
if ! grep -qxF "$line" ~/.bashrc; then
    { echo "$line"; cat ~/.bashrc; echo "$line"; } >~/.bashrc.new
    cat ~/.bashrc.new >~/.bashrc
    rm ~/.bashrc.new
fi
