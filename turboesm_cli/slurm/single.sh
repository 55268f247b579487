#!/bin/bash
# One job. Usage: sbatch single.sh OUT COMMAND ...
#   sbatch single.sh decode.csv decode 650M.tqz proteins.fasta --prompt 0.5
# Submit the same line again after a time-out: it continues, or ends at once if OUT is finished.
#SBATCH --job-name=turboesm
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=turboesm-%j.out
# For a GPU add a line: #SBATCH --gres=gpu:1

out=$1
shift
# --signal gives the step two minutes to save its work before the time limit. The last word is the exit code.
exec srun turboesm "$@" -o "$out" --if-done skip
