"""The house: which file may import which. Every import statement counts, also inside a function."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("models", "training", "service", "benchmarks")
MAY_IMPORT = {
    "unperturb": {"models"},  # the public API
    "models": {"models"},
    "training": {"training", "models"},
    "service": {"service", "models"},
    "benchmarks": {"benchmarks", "models", "training", "service"},
}
EXCEPTIONS = {("unperturb.service.cli", "training")}  # `unperturb train`: the one command for everything
ROBUSTBENCH = "unperturb.models.networks.robustbench"  # the only file that may import the package robustbench

Graph = Mapping[str, set[str]]


def files() -> dict[str, Path]:
    """Return every module of the project by its import name."""
    found = {"unperturb": ROOT / "unperturb" / "__init__.py"}
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(("unperturb", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = file
    return found


def folder_of(module: str) -> str:
    """Return the folder that a module lies in; the public API is one of its own."""
    return [*module.split("."), "unperturb"][1]


def imported(source: str) -> Iterator[tuple[str, ...]]:
    """Yield what each import of a source names, the likeliest first: `from a import b` is a.b, or else a."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            yield from ((f"{node.module}.{alias.name}", str(node.module)) for alias in node.names)


@pytest.fixture(scope="module")
def imports() -> dict[str, list[tuple[str, ...]]]:
    return {module: list(imported(file.read_text())) for module, file in files().items()}


@pytest.fixture(scope="module")
def graph(imports: dict[str, list[tuple[str, ...]]]) -> Graph:
    """Which module of the project imports which."""
    return {
        module: {target for names in named if (target := next((name for name in names if name in imports), ""))}
        for module, named in imports.items()
    }


def circle(graph: Graph) -> list[str]:
    """Return one circle of the graph, its first module again at its end, or an empty list."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for target in sorted(graph[module]):
            if found := visit(target):
                return found
        path.pop()
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module))), [])


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"]),
        ({"a": {"a"}}, ["a", "a"]),
    ],
    ids=["none", "two files", "itself"],
)
def test_circle_is_found(edges: Graph, expected: list[str]) -> None:
    assert circle(edges) == expected


def test_import_inside_a_function_is_found() -> None:
    source = "def f():\n    from unperturb.models import files\n    import unperturb.service.cli as cli\n"
    assert list(imported(source)) == [("unperturb.models.files", "unperturb.models"), ("unperturb.service.cli",)]


def test_no_circle_of_files(graph: Graph) -> None:
    assert len(graph) > 100
    assert not (found := circle(graph)), " -> ".join(found)


def test_folders_import_in_one_direction(graph: Graph) -> None:
    forbidden = []
    for module, targets in graph.items():
        for target in sorted(targets):
            towards = folder_of(target)
            if towards not in MAY_IMPORT[folder_of(module)] and (module, towards) not in EXCEPTIONS:
                forbidden.append(f"{module} -> {target}")
    assert not forbidden, "\n".join(forbidden)


def test_folders_are_imported_by_their_name_in_the_namespace() -> None:
    bare = [
        f"{file.relative_to(ROOT)}: {names[-1]}"
        for folder in (*FOLDERS, "tests")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for names in imported(file.read_text())
        if names[-1].split(".")[0] in FOLDERS
    ]
    assert not bare, "\n".join(bare)


def test_robustbench_is_imported_by_its_adapter_alone(imports: dict[str, list[tuple[str, ...]]]) -> None:
    users = {module for module, named in imports.items() for names in named if names[0].split(".")[0] == "robustbench"}
    assert users == {ROBUSTBENCH}


def test_tests_share_what_they_need_by_support_alone() -> None:
    shared = [
        f"{file.relative_to(ROOT)}: {names[-1]}"
        for file in sorted((ROOT / "tests").rglob("*.py"))
        for names in imported(file.read_text())
        if names[0].startswith("tests.") and ".test_" in names[0]
    ]
    assert not shared, "\n".join(shared)
