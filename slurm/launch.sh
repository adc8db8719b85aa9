# shellcheck shell=bash
# Sourced by the batch scripts from the folder $scripts: slurm/ in the repository's root, or the
# folder that `python -m fd_large init` wrote.
#
#   launch ARGUMENTS...    trains with these arguments of train.py, then ends the batch script
#
# One Python per GPU under srun; ranks and meeting place come from Slurm's own variables
# (fd_large/ranks/launch.py). How the ranks end decides what follows:
#
#   0         done: a job that starts once more finds the run finished and does nothing
#   2         a mistake of the user's: never requeued
#   3         somebody has to look (guard, teacher changed, not saved, folder lost): never requeued
#   75        saved before the time limit, or hung: requeued, by this script or by Slurm, once
#   others    a crash, a lost rank, a node that srun cannot reach: requeued as well
#
# srun returns the largest code of all ranks, or 137 where it had to kill one. So every rank that
# fails leaves its code in a file (fd_large/ranks/failures.py), and 2 or 3 found there is the job's.
#
# A job is given up after MAX_RESTARTS restarts that brought no newer checkpoint.

# shellcheck source=slurm/site.sh
source "$scripts/site.sh"
# After it: what sites load is rarely written for -u.
set -u -o pipefail

# Fields of the recipe without which no run starts, each with the setting of site.sh that fills it.
learns_from=(data.root DATA_ROOT teacher.source TEACHER_SOURCE)

# A checkout's sources, or the installed package.
program=(fd_large/train.py)
[[ -f fd_large/train.py ]] || program=(-m fd_large.train)

ranks=   # srun's process, while it runs
asked=   # the last signal that asked this job to end

# Without $(...): traps use it, and bash 5.2 cannot parse one in a trap that interrupts another.
say() {
    local start=$((${SLURM_RESTART_COUNT:-0} + 1))
    printf '%(%F %T)T job %s, start %d: %s\n' -1 "${SLURM_JOB_ID:-none}" "$start" "$*"
}

refuse() {
    echo "$*" >&2
    stay_ended
    exit 2
}

# Forbids Slurm to requeue this job. Once Slurm itself has ended a job after a pre-emption's grace,
# it also requeues the job after its next end, whatever the exit code.
stay_ended() {
    [[ ! ${SLURM_JOB_ID:-} ]] || ((${SLURM_RESTART_COUNT:-0} == 0)) ||
        scontrol update JobId="$SLURM_JOB_ID" Requeue=0
}

# value_of NAME ARGUMENTS...: what train.py takes for --NAME, the last one, with - or _, = or blank.
value_of() {
    local name=--$1 value='' word key previous=''
    shift
    for word; do
        key=${word%%=*}
        if [[ $word == --*=* && ${key//-/_} == "${name//-/_}" ]]; then value=${word#*=}; fi
        if [[ ${previous//-/_} == "${name//-/_}" ]]; then value=$word; fi
        previous=$word
    done
    printf '%s' "$value"
}

launch() {
    arguments=("$@")
    check_settings
    # Slurm's names for job and rank; they also make the names of the ranks' logs.
    logs="$LOG_DIR/slurm-${SLURM_JOB_NAME:-job}-${SLURM_JOB_ID:-none}"
    ledger="$logs.restarts"
    mkdir -p "$LOG_DIR" || refuse "LOG_DIR: cannot be made; got $LOG_DIR, expected a folder that" \
        "can be written. Set it in $scripts/site.sh."
    # A job keeps its number over restarts. The file's time is that of this start.
    if ((${SLURM_RESTART_COUNT:-0})); then touch "$ledger"; else : >"$ledger"; fi
    # Of this start alone: a rank of an earlier one may still be alive on a node that was lost.
    export FD_LARGE_EXITS="$logs-exits/start_$((${SLURM_RESTART_COUNT:-0} + 1))"
    [[ $FD_LARGE_EXITS == /* ]] || FD_LARGE_EXITS=$PWD/$FD_LARGE_EXITS
    export TORCH_FR_DUMP_TEMP_FILE="$logs-collectives_of_rank_"
    mkdir -p "$FD_LARGE_EXITS" && rm -f "$FD_LARGE_EXITS"/*
    # What nobody else can guess: the names begin with it under which the ranks speak to each other.
    export FD_LARGE_TOKEN_FILE=$FD_LARGE_EXITS/token
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$FD_LARGE_TOKEN_FILE") ||
        refuse "LOG_DIR: cannot be written; got $LOG_DIR, expected a folder for the ranks' token." \
            "Set it in $scripts/site.sh."

    # srun in the background: a trap runs at once while bash waits, but only after a command ends.
    trap 'hand_on USR1' USR1
    trap 'hand_on TERM' TERM
    load_software
    count_ranks
    check_nodes
    ((code != 0)) || check_run
    if [[ $STAGE_TO && ! $asked ]] && ((code == 0)); then stage_data; fi
    if [[ $asked ]]; then code=75; elif ((code == 0)); then run_ranks; fi
    finish
}

check_settings() {
    local recipe place setting what site=()
    [[ ! $STAGE_TO || $STAGE_TO == /* ]] || refuse "STAGE_TO: no whole path; got $STAGE_TO, expected" \
        "a folder of every node that begins with /. Set it in $scripts/site.sh."
    for ((place = 0; place < ${#learns_from[@]}; place += 2)); do
        setting=${learns_from[place + 1]}
        site+=("--${learns_from[place]}" "${!setting}")
        [[ -z $(value_of "${learns_from[place]}" "${site[@]}" "${arguments[@]}") ]] || continue
        case $setting in
            DATA_ROOT) what="a folder of images or tar files" ;;
            COCO_ROOT) what="the folder of a dataset with COCO's annotations" ;;
            ADE_ROOT) what="the folder of ADE20K" ;;
            NYU_ROOT) what="the folder of NYUv2" ;;
            TEACHER_SOURCE) what="the teacher's weights or \"random\"" ;;
            STUDENT_INIT) what="the folder of a run, or a file of weights" ;;
        esac
        refuse "$scripts/site.sh: $setting is empty; got nothing, expected $what. Set it there, or" \
            "$setting=PATH sbatch ..."
    done
    arguments=("${site[@]}" "${arguments[@]}")
    if [[ " ${arguments[*]} " == *" --fresh "* ]]; then
        refuse "--fresh: every restart of the job would begin anew; got --fresh, expected none in" \
            "a batch job. Move the run's folder away, or set --runtime.run_dir."
    fi
    recipe=$(value_of recipe "${arguments[@]}")
    run_dir=$(value_of runtime.run_dir "${arguments[@]}")
    run_dir=${run_dir:-runs/${recipe:-quickstart}}
}

load_software() {
    local mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS} place=$LOG_DIR
    # The ranks read their token there, and leave their exit codes.
    [[ $place == /* ]] || place=$PWD/$place
    [[ $place/ == "$PWD"/* || ! -d $place ]] || mounts+=,$place:$place
    [[ ! $STAGE_TO ]] || mounts+=,$STAGE_TO:$STAGE_TO
    # None of them empty, which bash before 4.4 takes for unset.
    on_nodes=(srun) inside=(env)
    if [[ $MODULES ]]; then
        type module >/dev/null 2>&1 || refuse "$scripts/site.sh: MODULES: no command \`module\`" \
            "on node $(hostname); got \"$MODULES\", expected it to be there. Source the script" \
            "that makes it in site.sh (often /etc/profile.d/modules.sh or lmod.sh)."
        set +u
        # shellcheck disable=SC2086 # several names
        module load $MODULES || refuse "$scripts/site.sh: MODULES; got \"$MODULES\", expected" \
            "what module load takes. See module avail."
        set -u
    fi
    case $CONTAINER in
        '') ;;
        *.sif)
            inside=(apptainer exec --nv --pwd "$PWD" --bind "$mounts" "$CONTAINER")
            ;;
        *)
            on_nodes+=(--container-image="$CONTAINER" --container-workdir="$PWD"
                --container-mounts="$mounts")
            ;;
    esac
}

# One rank for each GPU of a node, which share its cores, unless sbatch was told both. --exclusive
# gives the job all cores. Where Slurm does not count the GPUs, their numbers or names are counted.
count_ranks() {
    local named=${SLURM_JOB_GPUS:-${CUDA_VISIBLE_DEVICES:-}} gpus
    nodes=${SLURM_JOB_NUM_NODES:-1}
    tasks=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    if [[ ! $tasks && $named =~ ^([0-9]|GPU-|MIG-) ]]; then
        IFS=, read -r -a gpus <<<"$named"
        tasks=${#gpus[@]}
    elif [[ ! $tasks ]]; then
        tasks=1
        say "Slurm names no GPUs and no tasks of a node: one rank on each. For more:" \
            "sbatch --ntasks-per-node=N" >&2
    fi
    cores=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / tasks))}
    ((cores)) || cores=1
}

# Run on every node: asks PYTHON for the package and looks for what else the ranks import, looks for
# the files that the run names, takes a checksum of the source, which shows changes that are not
# committed too and needs no git in a container, and asks what Python is on.
# shellcheck disable=SC2016 # expanded on the nodes
on_a_node='
absent= broken=
program=$(command -v "$1") && kind=$(stat -f -c %T "$(dirname "$program")" 2>/dev/null)
said=$("$1" -c "import importlib.util as util, sys
import fd_large.cli.main
for name in (\"torch\", \"deepspeed\"):
    util.find_spec(name) or sys.exit(\"No module named \" + name)
print(*fd_large.__path__)" 2>&1) || broken=$(tail -n 1 <<<"$said" | tr "\t" " ")
sources=$(tail -n 1 <<<"$said")
[ ! -d fd_large ] || sources="fd_large ds_configs"
[ ! "$broken" ] || sources=
[ "$program" ] || broken="no such program"
shift
for path; do [ -e "$path" ] || absent="$absent $path"; done
sum=$(find ${sources:-/dev/null} -name "*.py" -o -name "*.json" | LC_ALL=C sort | xargs cat | cksum)
printf "%s\t%s\t%s\t%s\t%s\n" "${SLURMD_NODENAME:-$(hostname)}" "${sum%% *}" "$absent" "$kind" \
    "$broken"'

# What would fail again at each restart: the program that runs CONTAINER is nowhere.
check_container() {
    local node
    [[ $CONTAINER ]] || return
    if [[ ${inside[0]} == env ]]; then
        [[ $(srun --help 2>/dev/null) == *--container-image* ]] || refuse "$scripts/site.sh:" \
            "CONTAINER: srun has no --container-image; got $CONTAINER, expected Slurm's plugin" \
            "pyxis, or an IMAGE.sif for apptainer. Set CONTAINER in site.sh, or CONTAINER= and" \
            "PYTHON."
        return
    fi
    # shellcheck disable=SC2016 # expanded on the nodes
    node=$("${on_nodes[@]}" --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 bash -c \
        'command -v "$1" >/dev/null || echo "${SLURMD_NODENAME:-$(hostname)}"' \
        check "${inside[0]}" | head -n 1)
    [[ ! $node ]] || refuse "$scripts/site.sh: CONTAINER: node $node has no ${inside[0]}; got" \
        "$CONTAINER, expected ${inside[0]} in the PATH of every node. Load it with MODULES in" \
        "site.sh, put its folder into PATH there, or set CONTAINER= and PYTHON."
}

check_nodes() {
    local name path kind report paths=(.)
    paths+=("$FD_LARGE_TOKEN_FILE")
    [[ ! $STAGE_TO ]] || paths+=("$STAGE_TO")
    for name in data.root eval.root teacher.source student.init; do
        path=$(value_of "$name" "${arguments[@]}")
        # Patterns, names of packages and hubs, and a part of a file (FILE#teacher) are train.py's.
        [[ -z $path || $path == random || $path == *[:*?\{]* ]] || paths+=("${path%%#*}")
    done
    report=$("${on_nodes[@]}" --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
        "${inside[@]}" bash -c "$on_a_node" check "$PYTHON" "${paths[@]}")
    code=$?
    # srun itself failed: a node is lost, or the container; its message stands above.
    if ((code != 0)); then
        check_container
        say "srun returned $code: no answer from every node"
        code=1
        return
    fi
    path=$(awk -F '\t' '$5 != "" { print $1 " (" $5 ")"; exit }' <<<"$report")
    [[ -z $path ]] || refuse "PYTHON: cannot run fd_large; got $PYTHON on node $path, expected a" \
        "Python with fd_large's packages, at the same path on every node or in the container. Set" \
        "PYTHON in $scripts/site.sh, or PYTHON=PATH sbatch ..."
    path=$(awk -F '\t' '$3 != "" { print $1 ":" $3; exit }' <<<"$report")
    [[ -z $path ]] || refuse "node $path: does not exist there, expected what every node of the" \
        "job sees. Mend ${learns_from[1]}${learns_from[3]:+, ${learns_from[3]}}, LOG_DIR or" \
        "STAGE_TO in $scripts/site.sh, or put the files there."
    if (($(cut -f 2 <<<"$report" | sort -u | wc -l) != 1)); then
        refuse "fd_large: the nodes see different sources; got" \
            "$(cut -f 1,2 <<<"$report" | tr '\t\n' '= '), expected one checksum. Submit from a" \
            "folder that all nodes share, or copy it to every node."
    fi
    kind=$(awk -F '\t' '$4 ~ /^(nfs|lustre|gpfs|fhgfs|ceph|smb|cifs|panfs|afs)/ { print $4; exit }' \
        <<<"$report")
    [[ -z $kind ]] || say "PYTHON is on a network file system ($kind), in which each rank looks" \
        "for tens of thousands of files as it starts. An image (CONTAINER) or a copy on the nodes" \
        "starts sooner."
}

# What shows without a GPU is said once, not by every rank: fields, paths, a batch that does not
# divide. With the cores of a rank, by which the loading processes are bounded.
check_run() {
    "${on_nodes[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task="$cores" \
        --export=ALL "${inside[@]}" "$PYTHON" "${program[@]}" "${arguments[@]}" --check $((nodes * tasks))
    code=$?
    ((code != 2)) || {
        stay_ended
        exit 2
    }
    ((code == 0)) || say "the check of the settings returned $code"
}

# Run on every node: copies a folder to the node's own disk, each file read back against the
# checksum of what was read, and prints the checksum of all. A copy that nothing has touched is not
# read again; one that differs from its checksums, or whose origin has changed, is made anew.
# shellcheck disable=SC2016 # expanded on the nodes
stage_on_a_node='
set -o pipefail
source=$1 copy=$2 node=${SLURMD_NODENAME:-$(hostname)}
answer() { printf "%s\t%s\t%s\n" "$node" "$1" "$2"; exit 0; }
listed() { find -L "$1" -type f -printf "%P %s %T@$2\n" | LC_ALL=C sort | cksum; }
# Another boot may have lost what was written.
stamp() { cat /proc/sys/kernel/random/boot_id; listed "$copy" " %C@ %i"; }
mkdir -p "${copy%/*}" && exec 9>"$copy.lock" && flock 9 || answer "" "$copy: cannot be written"
origin=$(listed "$source") || answer "" "$source: cannot be read"
if [ -d "$copy" ] && [ "$origin" != "$(cat "$copy.origin" 2>&1)" ]; then
    echo "$node: $source has changed since it was copied" >&2
    rm -rf "$copy"
fi
if [ -d "$copy" ] && [ "$(stamp)" != "$(cat "$copy.stamp" 2>&1)" ]; then
    if (cd "$copy" && sha256sum --quiet --check "$copy.sums" >&2); then
        stamp >"$copy.stamp"
    else
        echo "$node: $copy: DAMAGED, copied again" >&2
        rm -rf "$copy"
    fi
fi
if [ ! -d "$copy" ]; then
    rm -rf "$copy.part"
    need=$(find -L "$source" -type f -printf "%s\n" | awk "{ n += \$1 } END { printf \"%d\", n }")
    free=$(df --output=avail -B1 "${copy%/*}" | tail -n 1)
    [ "$((need + 67108864))" -le "$free" ] ||
        answer "" "$copy: too little room, $((free / 1000000)) MB for $((need / 1000000))"
    (
        cd "$source" && mkdir "$copy.part" || exit 1
        find -L . -type d -exec mkdir -p "$copy.part/{}" \; || exit 1
        find -L . -type f -print0 | xargs -0 -r -n 16 -P 8 bash -c "$3" "$copy.part" |
            LC_ALL=C sort -k 2 >"$copy.sums"
    ) && echo "$origin" >"$copy.origin" && mv "$copy.part" "$copy" && stamp >"$copy.stamp" ||
        answer "" "$source: cannot be copied to $copy"
    echo "$node: $copy: $(wc -l <"$copy.sums") files copied" >&2
else
    echo "$node: $copy: all $(wc -l <"$copy.sums") files are there" >&2
fi
answer "$(cksum <"$copy.sums")" ""'
# Its part for some files, whose lines of sha256sum it prints; 255 ends xargs.
# shellcheck disable=SC2016
copy_files='
set -o pipefail
for path; do
    sum=$(tee -- "$0/$path" <"$path" | sha256sum) && sync -- "$0/$path" &&
        dd if="$0/$path" iflag=nocache count=0 status=none &&
        [ "$sum" = "$(sha256sum <"$0/$path")" ] && touch -r "$path" -- "$0/$path" || exit 255
    printf "%s  %s\n" "${sum%% *}" "$path"
done'

# Copies the folder that data.root names to STAGE_TO on every node, where the ranks then read it.
stage_data() {
    local source copy problem report=$FD_LARGE_EXITS/staged
    source=$(value_of data.root "${arguments[@]}")
    if [[ ! -d $source ]]; then
        say "STAGE_TO: only a folder is copied; $source is read where it is"
        return
    fi
    source=$(realpath -s "$source")
    # Folders of one name in two places are two copies.
    copy=$STAGE_TO/fd_large_staged-$(cksum <<<"$source" | cut -d ' ' -f 1)/${source##*/}
    say "STAGE_TO: copying $source to $copy, where it is not there yet"
    "${on_nodes[@]}" --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
        --cpus-per-task="$cores" "${inside[@]}" \
        bash -c "$stage_on_a_node" stage "$source" "$copy" "$copy_files" >"$report" &
    ranks=$!
    await
    [[ ! $asked ]] || return
    if ((code != 0)); then
        say "srun returned $code: no answer from every node"
        code=1
        return
    fi
    problem=$(awk -F '\t' '$3 != "" { print $1 ": " $3; exit }' "$report")
    [[ -z $problem ]] || refuse "STAGE_TO: node $problem. Mend that, or set STAGE_TO= in" \
        "$scripts/site.sh to read the images where they are."
    if (($(cut -f 2 "$report" | sort -u | wc -l) != 1)); then
        refuse "STAGE_TO: the copies differ; got" \
            "$(cut -f 1,2 "$report" | tr '\t\n' '= '), expected one checksum. Remove $copy on" \
            "the nodes that differ, and submit again."
    fi
    # Both, for resume.sh.
    arguments+=(--data.root "$source" --data.root "$copy")
}

# Waits for srun. A trap ends wait early; then it has to be called again for srun's own code.
await() {
    local caught
    while :; do
        caught=$asked asked=
        wait "$ranks"
        code=$?
        [[ $asked ]] || break
    done
    asked=$caught ranks=
}

# Blocks of ranks share a node (hpZ and a split teacher rely on it). The other ranks get a minute
# after the first one has ended, time to say why they end. srun does not take --cpus-per-task over
# from sbatch.
run_ranks() {
    say "the output of rank N is in $logs-rank_N.log"
    "${on_nodes[@]}" --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" \
        --export=ALL --distribution=block --kill-on-bad-exit=0 --wait=60 \
        --cpus-per-task="$cores" \
        --open-mode=append --output="$logs-rank_%t.log" \
        "${inside[@]}" "$PYTHON" "${program[@]}" "${arguments[@]}" &
    ranks=$!
    await
}

# At USR1 ranks save and end. srun passes it on to all of them; at a TERM, which Slurm sends to the
# ranks as well, it does no harm.
hand_on() {
    asked=$1
    say "got SIG$1"
    [[ -z $ranks ]] || kill -USR1 "$ranks" 2>/dev/null
}

finish() {
    local status='' again='' number file failed='' code_left=
    rm -f "$FD_LARGE_TOKEN_FILE"
    # 2 last, so that it wins: a mistake of the user's, rather than what followed from it.
    for number in 3 2; do
        file=$(grep -ls "\"code\": $number," "$FD_LARGE_EXITS"/*.json | head -n 1)
        if [[ $file ]]; then failed=$file code_left=$number; fi
    done
    if [[ $failed && $code != "$code_left" ]]; then
        say "srun returned $code, $(basename "$failed" .json) left $code_left:" \
            "$(sed -n 's/^ *"reason": "\(.*\)"$/\1/p' "$failed")"
        code=$code_left
    fi
    # A rank that is lost on its way out, or killed while it waits, hides the code of the others.
    if [[ ! $code =~ ^(0|2|3|75)$ && $run_dir/summary.json -nt $ledger ]]; then
        status=$(sed -n 's/^ *"status": "\(.*\)",*$/\1/p' "$run_dir/summary.json")
        say "srun returned $code, the run's status is $status"
        case $status in
            done) code=0 ;;
            preempted) code=75 ;;
            'not saved' | guard | 'teacher changed') code=3 ;;
        esac
    fi
    case $code in
        0) say "done: $run_dir" ;;
        2 | 3)
            say "exit code $code, not requeued. The last lines of rank 0:"
            tail -n 3 "$logs-rank_0.log" 2>/dev/null
            ;;
        *) requeue ;;
    esac
    [[ $again ]] || stay_ended
    exit "$code"
}

newest_checkpoint() {
    find "$run_dir/checkpoints" -maxdepth 1 -name 'step_*' ! -name 'step_*.*' -printf '%f\n' \
        2>/dev/null | sort | tail -n 1
}

# Once: a job that Slurm requeues as well would run a second time after its end.
requeue() {
    local job state reason newest count=0 before='' early=0 pause
    job=$(scontrol show job --oneliner "$SLURM_JOB_ID")
    field() { sed -n "s/.* $1=\([^ ]*\).*/\1/p" <<<"$job"; }
    state=$(field JobState) reason=$(field Reason)
    newest=$(newest_checkpoint) newest=${newest:-none}
    read -r count before early <"$ledger"
    # Where a partition's pre-emption means to cancel, nobody else would requeue.
    if [[ $(field PreemptTime) =~ ^[0-9] &&
        $(scontrol show partition "$(field Partition)") != *PreemptMode=CANCEL* ]]; then
        say "exit code $code; pre-empted by another job: Slurm requeues this one itself"
        again=1
        leave_to_slurm
        return
    fi
    if [[ $(field Requeue) == 0 ]]; then
        say "exit code $code; not requeued: the job may not be requeued (Requeue=0)"
        return
    fi
    if [[ $state && $state != RUNNING && $reason != TimeLimit ]]; then
        say "exit code $code; not requeued: cancelled, or Slurm has requeued it ($state)"
        again=1
        return
    fi
    [[ $newest == "$before" ]] || count=0
    if ((count >= MAX_RESTARTS)); then
        say "exit code $code; given up: no newer checkpoint than $newest after $count restarts." \
            "See $logs-rank_*.log"
        return
    fi
    echo "$((count + 1)) $newest $((early))" >"$ledger"
    for pause in 0 10 60; do
        sleep "$pause"
        scontrol requeue "$SLURM_JOB_ID" || continue
        say "exit code $code; requeued (newest checkpoint: $newest; restart $((count + 1)) of" \
            "$MAX_RESTARTS from there)"
        again=1
        return
    done
    say "exit code $code; Slurm did not take the requeue: submit again, the run goes on"
}

# The nodes are free as soon as the script ends. But the MaxBatchRequeue-th time that a job ends in
# the grace of a pre-emption Slurm holds it (launch_failure_limit_exceeded_requeued_held); one that
# it ended itself, when the grace was over, is not counted. So near the limit the script waits.
leave_to_slurm() {
    local most
    most=$(scontrol show config | sed -n 's/^MaxBatchRequeue *= *//p')
    if ((early + 1 < ${most:-5})); then
        echo "$((count)) ${before:-none} $((early + 1))" >"$ledger"
        return
    fi
    say "left early $early times, MaxBatchRequeue is ${most:-5}: waits for the end of the grace"
    while [[ $asked != TERM ]]; do sleep 1; done
}
