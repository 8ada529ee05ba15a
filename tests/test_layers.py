"""Who may import whom: the wings know nothing of each other, and inside a wing a file imports from floors below."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import gradientless

ROOT = Path(gradientless.__file__).parent
BOTH_WINGS = {
    f"gradientless.{name}" for name in ("delta", "errors", "inputs", "schema", "terminal", "writing")
}  # all that a wing may know beyond itself

FLOORS = {  # the first pattern that a module begins with; a folder stands on one floor
    "gradientless.search": [
        {"fingerprint", "points", "rates", "schedules", "selection", "trajectory", "uninterrupted", "watched"},
        {"noise"},
        {"space"},
        {"evaluators"},
        {"optim"},
    ],
    "gradientless.language": [
        {"dropout", "starter", "tables", "metrics", "kept", "tasks.base", "surfaces.head_session"},
        {"splits", "encodings"},
        {"tasks", "backbone"},
        {"reading"},
        {"data", "prompting", "seen"},
        {"features", "readouts"},
        {"surfaces"},
    ],
}


def module_name(path: Path) -> str:
    parts = ("gradientless", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name: str, source: str | None = None) -> set[str]:
    """Everything that module `name` imports, inside functions too; modules of ours by their full name."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8") if source is None else source)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports must be absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in FILES else str(node.module))
    return found


def for_types_alone(name: str) -> set[str]:
    """What is imported under `if TYPE_CHECKING`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            found |= imports(name, "\n".join(ast.unparse(child) for child in node.body))
    return found


def ours(name: str) -> set[str]:
    return {found for found in imports(name) if found.split(".")[0] == "gradientless"}


def wing(name: str) -> str:
    return ".".join(name.split(".")[:2])


def floor(name: str) -> tuple[str, int, str]:
    """(wing, floor, room) of a module of a wing; rooms are files and folders."""
    rooms = FLOORS[wing(name)]
    rest = name[len(wing(name)) + 1 :]
    for level, names in enumerate(rooms):
        for room in names:
            if rest == room and "." in room:
                return wing(name), level, rest
    for level, names in enumerate(rooms):
        if rest.split(".")[0] in names:
            return wing(name), level, rest.split(".")[0]
    raise AssertionError(f"{name} must stand on a floor: add it to FLOORS")


def test_the_package_was_found():
    assert {"gradientless.search.optim.gld", "gradientless.language.surfaces.head", "gradientless.cli"} <= set(FILES)
    assert "gradientless.search.noise" in ours("gradientless.search.space")
    assert "gradientless.search.noise.cpu" in ours("gradientless.search.noise")


@pytest.mark.parametrize("own", sorted(FLOORS))
def test_a_wing_knows_itself_and_the_two_shared_files(own):
    for name in FILES:
        if wing(name) == own:
            strange = {found for found in ours(name) if wing(found) != own and found not in BOTH_WINGS}
            assert not strange, f"{name} imports {sorted(strange)}"


def test_the_shared_files_know_nobody():
    for name in BOTH_WINGS:
        assert not ours(name) - BOTH_WINGS


@pytest.mark.parametrize("own", sorted(FLOORS))
def test_a_file_imports_only_from_floors_below(own):
    for name in FILES:
        if wing(name) != own or name == own:
            continue
        _, level, room = floor(name)
        for found in ours(name) - for_types_alone(name):
            if wing(found) != own:
                continue
            _, other, other_room = floor(found)
            assert other < level or other_room == room, f"{name} (floor {level}) imports {found} (floor {other})"


def test_nobody_below_knows_the_run_and_nobody_the_command_line():
    for name in FILES:
        above = {found for found in ours(name) if wing(found) in ("gradientless.run", "gradientless.cli")}
        if wing(name) in ("gradientless.cli", "gradientless.__main__"):
            continue
        assert not {found for found in above if wing(found) == "gradientless.cli"}, name
        assert wing(name) == "gradientless.run" or not above, name
    assert {wing(name) for name in FILES} == {
        "gradientless", "gradientless.__main__", "gradientless.cli", *BOTH_WINGS,
        "gradientless.integrations", "gradientless.language", "gradientless.run", "gradientless.search",
    }  # fmt: skip


def test_there_are_no_cycles():
    graph = {name: {found for found in ours(name) - for_types_alone(name) if found in FILES} for name in FILES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_one_file_imports_transformers_integrations_aside():
    users = {name for name in FILES if any(found.split(".")[0] == "transformers" for found in imports(name))}
    assert users == {"gradientless.language.backbone", "gradientless.integrations.transformers"}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_optimizers_alone_need_no_more_than_torch_numpy_and_numba():
    loaded = loaded_by("import gradientless, gradientless.search.optim")
    assert {"gradientless", "torch", "numpy", "numba"} <= loaded
    extra = {"transformers", "pydantic", "typer", "rich", "datasets", "safetensors", "tensorboard", "matplotlib"}
    assert not loaded & extra


def test_the_command_line_loads_torch_only_when_a_command_needs_it():
    loaded = loaded_by("import gradientless.cli")
    assert "typer" in loaded
    assert not loaded & {"transformers", "datasets"}
