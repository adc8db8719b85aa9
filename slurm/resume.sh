#!/bin/bash
# Resumes a run from its folder alone, on any number of nodes.
#
#   sbatch --nodes=4 slurm/resume.sh runs/fd_swinv2g [--section.field VALUE ...]
#
# The arguments that started it are in the folder (environment.json), whoever launched it, as are
# its data and teacher (recipe.json); arguments after the folder win over them. Code of your own that
# the folder names runs if a start of yours has named it before, or by --allow-code FILE.py after the
# folder. The options below are explained in slurm/fd_swinv2g.sh.

#SBATCH --job-name=fd_resume
#SBATCH --nodes=8
#SBATCH --gres=gpu:8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue

cd "${SLURM_SUBMIT_DIR:-$PWD}" || exit 2
scripts=slurm
[[ -f slurm/launch.sh ]] || scripts=.
if [[ ! -f $scripts/launch.sh ]]; then
    echo "slurm: got $PWD, expected the folder of launch.sh, or the repository. Submit from there." >&2
    exit 2
fi
source "$scripts/launch.sh"

run=${1:-}
[[ -f $run/environment.json ]] ||
    refuse "$scripts/resume.sh: not a run; got \"$run\", expected a folder with an environment.json." \
        "Name it first: sbatch $scripts/resume.sh runs/NAME."
shift
# Outside of a container, whose Python may not be this node's.
reader=$(command -v "$PYTHON" || command -v python3) ||
    refuse "$scripts/resume.sh: no Python; got PYTHON=$PYTHON, expected one that runs here. Set it" \
        "in $scripts/site.sh."
before=()
while IFS= read -r -d '' word; do before+=("$word"); done < <("$reader" - "$run" <<'PYTHON'
import json, re, sys

try:
    with open(sys.argv[1] + "/environment.json") as environment:
        words = json.load(environment)["command"][1:]
    with open(sys.argv[1] + "/recipe.json") as recipe:
        fields = json.load(recipe)
    # fd_large/train.py has no command, but `python -m fd_large train` has.
    words = words[1:] if words[:1] == ["train"] else words
    # What a launcher adds, and what would begin anew.
    words = [word for word in words if not word.startswith("--local_rank") and word != "--fresh"]
    # The folder may come from others, so its words allow no code; those after it may.
    allowing, kept = False, []
    for word in words:
        if word.startswith("--"):
            allowing = word.partition("=")[0].replace("-", "_") == "__allow_code"
        if not allowing:
            kept.append(word)
    words = kept
    # Fields that left (docs/stability.md), which the command line refuses.
    for name in ("--optim.max_seconds", "--data.stage_to"):
        words = [word for word in words if not word.startswith(name + "=")]
        while name in words:
            del words[words.index(name) : words.index(name) + 2]
    # environment.json keeps no secrets of URLs; recipe.json, which its owner alone may read, does.
    name = ""
    for place, word in enumerate(words):
        name, mark, value = word.partition("=") if word.startswith("--") else (name, "", word)
        if "***" in value:
            held = fields
            for part in name[2:].replace("-", "_").split("."):
                held = held[part]
            words[place] = name + mark + held if mark else held
    root = fields["data"]["root"]
    # launch.sh names the images and then their copy, which the new nodes may not have.
    if words[-4::2] == ["--data.root"] * 2 and words[-1] == root:
        words, root = words[:-4], words[-3]
    # First, since they may come from the recipe and stand in no argument.
    found = [root, fields["teacher"]["source"], *words]
    # Names of code, which the command then takes without permission: UNNAMED in fd_large/doors.py.
    found = [re.sub("(^|=)module:", r"\1stored-module:", word) for word in found]
    text = "".join(word + "\0" for word in found)
except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    text = f"{type(error).__name__}: {error}\0"
sys.stdout.write(text)
PYTHON
)
((${#before[@]} > 1)) || refuse "$run: cannot be read; got ${before[0]:-nothing}, expected the" \
    "environment.json and recipe.json of a run. Submit again the script that started it."
# The run's own, not the site's.
# shellcheck disable=SC2034 # launch reads them by their names
DATA_ROOT=${before[0]} TEACHER_SOURCE=${before[1]}
[[ $TEACHER_SOURCE ]] || learns_from=(data.root DATA_ROOT)

launch "${before[@]:2}" --runtime.run_dir "$run" "$@"
