#!/usr/bin/env bash
#SBATCH --job-name=lcray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=08:00:00
# One analysis on the nodes of a SLURM job: sbatch slurm.sh RUN OUT. Ray starts on every node, lcray
# runs on the first, and all of it ends with the job. Submit it again to go on where it stopped.
#
# --exclusive, since Ray takes its cores from the machine, and stops every Ray of yours on it.
# For GPUs add #SBATCH --gpus-per-node=…; for an environment, its activation here.
set -euo pipefail
run="$1" out="$2"
code="${LCRAY_CODE:-$SLURM_SUBMIT_DIR/code}" # on storage that every node sees
export RAY_AUTH_MODE=token                   # ~/.ray/auth_token: ray get-auth-token --generate
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):6379"
srun ray symmetric-run --address "$head" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
  lcray analyze "$run" --task "$code/mytask.py:task" --out "$out" --address "$head"
