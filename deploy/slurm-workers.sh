#!/bin/bash
# One worker per GPU, for docs/guides/many-machines.md ("Slurm"): sbatch deploy/slurm-workers.sh
# Redis and the daemon run on a node that the compute nodes reach.
#SBATCH --job-name=selfpruner-worker
#SBATCH --array=0-3
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@60
#SBATCH --requeue
export SELFPRUNER_REDIS__URL=redis://${SELFPRUNER_HOST:?the node with Redis}:6379
export SELFPRUNER_REDIS__PASSWORD_FILE=${SELFPRUNER_PASSWORD_FILE:-$HOME/.secrets/redis}
source "${SELFPRUNER_HOME:-$HOME/self-pruner}/.venv/bin/activate"
exec selfpruner worker --config "${SELFPRUNER_CONFIG:?the settings file of the daemon}" --grace-seconds 30 \
    --exit-when-done --idle-seconds 1800
