"""The house: rooms import from lower floors only, and heavy packages stay in their rooms.

Every import counts: inside functions and under TYPE_CHECKING as well. Each test lists all that is
broken.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fd_large.recipes.architectures import FAMILIES
from fd_large.tasks.registry import TASKS

PACKAGE = Path(__file__).resolve().parents[2] / "fd_large"
FLOORS = {
    "errors": 0,
    "allowed_code": 0,
    "doors": 0,
    "files": 0,
    "ranks": 0,
    "shipped": 0,
    "imports": 0,
    "mapped_files": 0,
    "markdown": 0,
    "kernels": 0,
    "recipes": 0,
    "backbones": 1,
    "plan": 2,
    "weights": 2,
    "data": 2,
    "checkpoint": 3,
    "runtime": 3,
    "report": 3,
    "engine": 4,
    "probes": 4,
    "tasks": 5,
    "evaluation": 6,
    "cli": 7,
    "__main__": 8,
    "api": 8,
    "train": 8,
}
# Files that recipes may import: the description of a task or a family, without torch and without
# the rest of its room.
DESCRIPTIONS = ("tasks/*/section.py", "tasks/registry.py", "backbones/*/architecture.py")
# All other functions take plain arguments.
SEE_A_RUN = (
    "cli/*.py",
    "evaluation/*.py",
    "evaluation/*/*.py",
    "__init__.py",
    "api.py",
    "engine/run.py",
    "engine/opening.py",
    "engine/job.py",
    "tasks/jobs.py",
    "tasks/*/job.py",
    "tasks/transfer.py",
    "tasks/*/transfer.py",
)
FOR_ALL = {
    "errors",
    "files",
    "ranks",
    "allowed_code",
    "doors",
    "mapped_files",
    "markdown",
}
ONLY_IN = {
    "deepspeed": ("engine/zero", "checkpoint"),
    "apex": ("kernels", "engine/zero"),
    "fairscale": ("engine",),
}
WITHOUT_TORCH = {
    "recipes",
    "plan",
    "errors",
    "allowed_code",
    "doors",
    "files",
    "ranks",
    "mapped_files",
    "markdown",
    "shipped",
    "report",
    "evaluation",
    "cli",
}
TORCH_IN_RANKS = {"fd_large.ranks.distributed", "fd_large.ranks.meeting"}
# What diagnosis measures with, as its protocol.py does not: --help names the protocols.
TORCH_INSIDE = (
    *TORCH_IN_RANKS,
    *(
        f"fd_large.evaluation.diagnosis.{name}"
        for name in ("attention", "cka", "examine", "landscape", "models", "sample")
    ),
    "fd_large.evaluation.embedding",
)
# Names of tasks that are compared as what else they name, such as kinds of a head.
NO_TASKS = {
    "tasks/distillation/stored.py": {"linear"},
    "tasks/distillation/model_card.py": {"linear"},
    # A ViT of timm has a field of that name.
    "backbones/timm/architecture.py": {"depth"},
    "tasks/depth/section.py": {"linear"},
    "tasks/segmentation/section.py": {"linear"},
}
# Questions and readers that `files.py` has for all, and where a file has its own.
ASKED_IN_FILES = {"exists", "lexists", "is_file", "is_dir", "isfile", "isdir", "json.load"}
ASKS_ITSELF = {
    "files.py": ASKED_IN_FILES,
    # Entries of os.scandir, which know their kind.
    "data/folder.py": {"is_file", "is_dir"},
    "data/roots.py": {"is_dir"},
    "data/source.py": {"is_dir"},
    "report/run_list.py": {"is_dir"},
    # An impossible name is no file, whatever the system says: no code of it runs.
    "doors.py": {"isfile"},
    # Whose thread must not wait while a file system is busy.
    "checkpoint/lease.py": {"exists", "is_dir"},
}
# Tests of what is no file of the package.
OF_NO_FILE = {
    "kernels/test_blocks_rule.py": "benchmarks/kernels.py",
    "kernels/test_aot.py": "kernels compiled for GPUs that are not here",
    "kernels/test_roofline.py": "benchmarks/roofline.py",
    "kernels/test_triton.py": "starts triton_*.py in Triton's interpreter",
    "plan/test_scaling_page.py": "docs/scaling.md",
    "cli/test_foreign_runs.py": "every command on a run folder from elsewhere",
    "probes/test_claim.py": "benchmarks/claim.py",
    "tasks/distillation/test_seams.py": "the seams of task.py, filled together",
    "test_changed.py": ".ci/changed.py",
    "test_cuda_calls.py": "what only a GPU's rank calls",
    "test_devices.py": "the package on a card that is not here",
    "test_first_run.py": "docs/first_run.ipynb",
    "test_house.py": "the package as a whole",
    "test_dist.py": ".ci/dist.py",
    "test_mutate.py": ".ci/mutate.py",
    "test_oracles.py": "tests/oracles/oracles.py",
    "test_pages.py": "README.md and docs/",
    "test_public_names.py": "names under semantic versioning",
    "test_readme_figures.py": "README.md and benchmarks/results/",
    "test_requirements.py": "requirements/ against pyproject.toml",
    "test_size.py": ".ci/size.py",
    "test_slurm_script.py": "slurm/",
    "weights/test_hostile_files.py": "tests/support/models/hostile.py",
}
FOLDERS = {kind.folder for kind in TASKS.values()}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    if any(inside.match(pattern) for pattern in DESCRIPTIONS):
        return "recipes"
    return inside.parts[0].removesuffix(".py")


def module(path: Path) -> str:
    return ".".join(("fd_large", *path.relative_to(PACKAGE).with_suffix("").parts))


ROOMS = {module(path): room(path) for path in FILES}


@cache
def parsed(path: Path) -> tuple[ast.Module, list[ast.AST]]:
    """A file's tree and all of its nodes."""
    tree = ast.parse(path.read_text())
    return tree, list(ast.walk(tree))


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Modules and names that a file imports, each as a dotted name."""
    tree, nodes = parsed(path)
    for node in tree.body if top_level else nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in ROOMS else str(node.module)


def all_hold(broken: list[str]) -> None:
    """Fails with everything that breaks a rule, one a line."""
    assert not broken, "\n".join(("", *broken))


def test_imports_are_absolute() -> None:
    all_hold(
        [
            f"{path.relative_to(PACKAGE)}: line {node.lineno} is a relative import"
            for path in FILES
            for node in parsed(path)[1]
            if isinstance(node, ast.ImportFrom) and node.level
        ]
    )


def test_imports_come_from_lower_floors() -> None:
    broken = []
    for path in FILES:
        here = room(path)
        inside = str(path.relative_to(PACKAGE))
        for name in imports(path):
            package, _, rest = name.partition(".")
            if package == "fd_large" and rest and here != "__init__":
                there = ROOMS.get(name, rest.split(".")[0])
                allowed = there == here or there in FOR_ALL or FLOORS[there] < FLOORS[here]
                if not allowed:
                    broken.append(f"{inside}: {here} (floor {FLOORS[here]}) imports {name}")
            if package in ONLY_IN and not inside.startswith(ONLY_IN[package]):
                broken.append(f"{inside} imports {package}")
            if package == "triton" and not path.name.endswith("_triton.py"):
                broken.append(f"{inside} imports triton, and is no *_triton.py")
    all_hold(broken)


def test_the_engine_imports_no_task() -> None:
    all_hold(
        [
            f"{path.relative_to(PACKAGE)} imports {name}"
            for path in FILES
            if room(path) == "engine"
            for name in imports(path)
            if name.startswith("fd_large.tasks")
        ]
    )


def test_of_the_engine_only_what_opens_a_run_imports_counting() -> None:
    """What is counted before a run is nothing that the loop has to know."""
    folder = PACKAGE / "engine"
    all_hold(
        [
            f"{path.relative_to(PACKAGE)} imports {name}"
            for path in folder.rglob("*.py")
            if path.name not in ("opening.py", "run.py") and "counting" not in path.parts
            for name in imports(path)
            if name.startswith("fd_large.engine.counting")
        ]
    )


def test_a_whole_run_is_seen_by_few() -> None:
    broken = []
    for path in FILES:
        if room(path) == "recipes":
            continue
        inside = path.relative_to(PACKAGE)
        sees = any(inside.match(pattern) for pattern in SEE_A_RUN)
        if not sees and "fd_large.recipes.run" in imports(path):
            broken.append(f"{inside}: take plain arguments, or a TrainingJob")
    all_hold(broken)


def test_no_name_of_a_task_or_a_family_is_compared_outside_its_folder() -> None:
    names = {**{name: kind.folder for name, kind in TASKS.items()}, **{f: f for f in FAMILIES}}
    del names["timm"]  # The library is called so too.
    broken = []
    for path in FILES:
        inside = str(path.relative_to(PACKAGE))
        for node in parsed(path)[1]:
            if isinstance(node, ast.Compare):
                operator = node.ops[0]
                if isinstance(node.left, ast.Constant) and isinstance(
                    operator, (ast.In, ast.NotIn)
                ):
                    continue  # A key that is looked up, as COCO's "segmentation".
                compared = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                for name in (compared & names.keys()) - NO_TASKS.get(inside, set()):
                    if names[name] not in path.parts:
                        broken.append(f"{inside}: line {node.lineno} compares {name!r}")
    all_hold(broken)


def test_a_task_imports_no_other_task() -> None:
    broken = []
    for path in sorted(PACKAGE.glob("tasks/*/**/*.py")):
        inside = path.relative_to(PACKAGE)
        own = inside.parts[1]
        for name in imports(path) if own in FOLDERS | {"dense"} else ():
            if name.startswith("fd_large.tasks.") and name.split(".")[2] in FOLDERS - {own}:
                broken.append(f"{inside} imports {name}")
    all_hold(broken)


def test_torch_is_not_imported_where_help_must_be_quick() -> None:
    heavy = {"torch", "torchvision", "timm", "deepspeed", *TORCH_IN_RANKS}
    all_hold(
        [
            f"{path.relative_to(PACKAGE)} imports {name}"
            for path in FILES
            if room(path) in WITHOUT_TORCH and not module(path).startswith(TORCH_INSIDE)
            for name in imports(path, top_level=True)
            if name in heavy
        ]
    )


def test_whether_a_path_exists_and_what_json_holds_is_asked_in_files() -> None:
    """Path.exists and its sisters raise what the system says, or hide it; json has no bounds."""
    asked: dict[str, set[str]] = {}
    for path in FILES:
        for node in parsed(path)[1]:
            if isinstance(node, ast.Attribute) and node.attr in ("load", "loads"):
                name = ast.unparse(node).removesuffix("s")
            else:
                name = node.attr if isinstance(node, ast.Attribute) else ""
            if name in ASKED_IN_FILES:
                asked.setdefault(str(path.relative_to(PACKAGE)), set()).add(name)
    asked["files.py"] = ASKED_IN_FILES
    all_hold(
        [
            f"{file}: {', '.join(sorted(names))}: ask files.kind_of, read_json or parse_json"
            for file in asked.keys() | ASKS_ITSELF.keys()
            if (names := asked.get(file, set()) ^ ASKS_ITSELF.get(file, set()))
        ]
    )


def test_no_cycles() -> None:
    graph = {module(path): sorted({n for n in imports(path) if n in ROOMS}) for path in FILES}
    done: set[str] = set()
    cycles = []

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            cycles.append(" -> ".join((*trail[trail.index(name) :], name)))
        elif name not in done:
            for other in graph[name]:
                if other != name:
                    visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    all_hold(cycles)


def test_tests_mirror_the_house() -> None:
    """The test of ROOM/FILE.py is ROOM/test_FILE.py, so that a test whose file is gone shows."""
    tests = Path(__file__).resolve().parent
    inside = [path.relative_to(tests) for path in tests.rglob("test_*.py")]
    gone = sorted(OF_NO_FILE.keys() - {str(path) for path in inside})
    broken = [f"{name}: in OF_NO_FILE, and gone" for name in gone]
    for path in sorted(inside):
        twin = path.with_name(path.name.removeprefix("test_"))
        if (PACKAGE / twin).is_file() == (str(path) in OF_NO_FILE):
            broken.append(f"{path}: a test of {twin}, or in OF_NO_FILE with a reason; not both")
    all_hold(broken)


def test_of_the_core_of_distillation_only_its_job_knows_a_wing() -> None:
    """What a recipe may name stands in tables of job.py; what others need of a wing is given."""
    folder = PACKAGE / "tasks" / "distillation"
    wings = {"several", "cached", "masked"}
    named = re.compile(rf"\b({'|'.join(wings)})[./]\w")
    all_hold(
        [
            f"{path.relative_to(folder)}: line {number} names a wing"
            for path in folder.rglob("*.py")
            if path.name != "job.py" and not wings & set(path.parts)
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if named.search(line)
        ]
    )


def test_no_room_without_a_name() -> None:
    nameless = {"utils", "util", "helpers", "common", "misc", "tools"}
    inside = [path.relative_to(PACKAGE) for path in FILES]
    all_hold([str(path) for path in inside if {path.stem, *path.parts} & nameless])
