#!/usr/bin/env bash
# sbatch examples/slurm.sh run.yaml runs/NAME
#
# Slurm signals the ranks two minutes before the time limit; they finish the step, undo a trial in progress, save and
# exit with code 143. The job is then requeued and resumes from the newest complete checkpoint. It is also requeued
# after a node has failed.
#SBATCH --job-name=pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

config=$1
run_dir=$2
export MASTER_ADDR
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=29500
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

srun --kill-on-bad-exit=1 python pretrain_gpt.py --config "$config" --run-dir "$run_dir" --auto-resume
code=$?
case $code in
    0) echo "the run is complete" ;;
    2) echo "the run was refused: see the error above" ;;
    5) echo "the loss guard stopped the run: see the last lines above" ;;
    *) echo "exit code $code: requeued" && scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit $code
