#!/bin/bash
# Images a second over node counts: 1, 2, 4 ... up to the nodes of the job, each contender of
# benchmarks/throughput.py, and the scaling table from them.
#
#   sbatch --nodes=8 slurm/throughput.sh
#   sbatch --nodes=64 slurm/throughput.sh --model swinv2_giant --image-size 192 --micro-batch 32 \
#       --contenders zero3 hpz fsdp2
#
# Submit from the repository's root; software and network of the site: slurm/site.sh. Arguments
# after the script go to throughput.py. No data and no weights are needed. Everything is written to
# LOG_DIR; the output of the job ends with the table.

#SBATCH --job-name=throughput
#SBATCH --nodes=4
# Every task sees all GPUs of its node, as in slurm/fd_swinv2g.sh.
#SBATCH --gres=gpu:8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=02:00:00
#SBATCH --output=slurm-%x-%j.out

cd "${SLURM_SUBMIT_DIR:-$PWD}" || exit 2
if [[ ! -f slurm/launch.sh ]]; then
    echo "slurm: got $PWD, expected the repository's root. Submit from there." >&2
    exit 2
fi
scripts=slurm
source slurm/launch.sh
load_software
count_ranks

folder="$LOG_DIR/slurm-${SLURM_JOB_NAME:-job}-${SLURM_JOB_ID:-none}"
mkdir -p "$folder" || refuse "LOG_DIR: cannot be made; got $LOG_DIR, expected a folder that can be" \
    "written. Set it in slurm/site.sh."
export PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}

# step NODES TASKS NAME ARGUMENTS...: the program on so many nodes and ranks of each.
step() {
    local nodes=$1 tasks=$2 name=$3
    shift 3
    "${on_nodes[@]}" --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" \
        --export=ALL --distribution=block --kill-on-bad-exit=0 --wait=60 \
        --cpus-per-task="$cores" --output="$folder/$name-rank_%t.log" \
        "${inside[@]}" "$PYTHON" "$@"
}

most=$nodes nodes=1 files=()
while :; do
    file="$folder/nodes_$nodes.json"
    say "$nodes node(s)"
    step "$nodes" "$tasks" "nodes_$nodes" benchmarks/throughput.py "$@" --as-rank --out "$file"
    # srun's code may be that of a rank that was lost on its way out, all work done.
    if [[ -s $file ]]; then
        files+=("$file")
    else
        say "$nodes node(s): no result. The last lines of rank 0:"
        tail -n 3 "$folder/nodes_$nodes-rank_0.log" 2>/dev/null
    fi
    ((nodes < most)) || break
    nodes=$((nodes * 2 < most ? nodes * 2 : most))
done
((${#files[@]})) || refuse "throughput: no node count gave a result. See $folder."
step 1 1 scaling benchmarks/scaling.py "${files[@]}" --out "$folder/scaling.csv"
code=$?
cat "$folder/scaling-rank_0.log"
exit "$code"
