#!/bin/bash
# The last job of `fd-large transfer --slurm`: makes the table of what the others have trained.
#
# It needs one core for a minute, and begins once the others have ended, whatever came of them.

#SBATCH --job-name=transfer_table
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out

cd "${SLURM_SUBMIT_DIR:-$PWD}" || exit 2
scripts=slurm
[[ -f slurm/launch.sh ]] || scripts=.
if [[ ! -f $scripts/launch.sh ]]; then
    echo "slurm: got $PWD, expected the folder of launch.sh, or the repository. Submit from there." >&2
    exit 2
fi
source "$scripts/launch.sh"

load_software
"${on_nodes[@]}" --nodes=1 --ntasks=1 "${inside[@]}" "$PYTHON" -m fd_large transfer --table "$@"
