"""The digest of the code behind a thing: its module's file and those that it imports, but not the whole project."""

import ast
import hashlib
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

PROJECT = "unperturb"


def code_digest(modules: Iterable[str], *, without: tuple[str, ...] = ()) -> str:
    """Return the SHA-256 over the files of the named modules and of what they import, of this project or beside them.

    `without`: packages whose modules are left out, since something else stands for them. Code without a file, as
    in a notebook, has another digest every time: what it computed is not found again.
    """
    digest = hashlib.sha256()
    names = set[str]()
    for module in modules:
        if _file(module) is None:
            digest.update(uuid.uuid4().bytes)
        else:
            names |= modules_behind(module, without)
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(_source(name))
    return digest.hexdigest()


def versions_behind(modules: Iterable[str], *, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the versions of the installed packages that the named modules are of, or that their code imports.

    Their code is what `code_digest` is over; of a module of an installed package its own version alone counts.
    """
    names = set[str]()
    for module in modules:
        names.add(module)
        file = _file(module)
        if file is not None and (module.partition(".")[0] == PROJECT or "site-packages" not in file.parts):
            for name in modules_behind(module, without):
                names |= _imported_by(name)
    packages = {package for name in names for package in _packages().get(name.partition(".")[0], ())}
    return {package: metadata.version(package) for package in sorted(packages)}


@cache
def _packages() -> Mapping[str, list[str]]:
    """Return the installed packages by the names under which they are imported."""
    return metadata.packages_distributions()


@cache
def modules_behind(module: str, without: tuple[str, ...] = ()) -> frozenset[str]:
    """Return the names of a module and of those that it imports, of its own project or beside it."""
    found, waiting = {module}, [module]
    while waiting:
        name = waiting.pop()
        for imported in _imported_by(name):
            left_out = any(f"{imported}.".startswith(f"{package}.") for package in without)
            if imported not in found and not left_out and _belongs(imported, to=name):
                found.add(imported)
                waiting.append(imported)
    return frozenset(found)


def _package_of(name: str) -> str:
    return name if _known_file(name).name == "__init__.py" else name.rpartition(".")[0]


def _belongs(imported: str, *, to: str) -> bool:
    """Return whether a name is a module of the same project: this one, or somebody's own package, or file beside it.

    Of installed packages (their versions stand for them) nothing more is followed.
    """
    top = to.partition(".")[0]
    if imported.partition(".")[0] in (PROJECT, top) and "site-packages" not in _known_file(to).parts:
        return _origin(imported) is not None
    beside = _known_file(to).parent / f"{imported}.py"
    return top != PROJECT and beside.exists() and _origin(imported) == beside


@cache
def _imported_by(name: str) -> frozenset[str]:
    """Return the names of modules that a module imports when it is run, and names that may be modules."""
    package, found = _package_of(name), set[str]()
    for node in _run_when_imported(ast.parse(_source(name))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*above, node.module]))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def _run_when_imported(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield node
        yield from _run_when_imported(node)


@cache
def _origin(name: str) -> Path | None:
    """Return the Python file of a module; None where there is none of the name."""
    try:
        spec = find_spec(name)
    except (ModuleNotFoundError, AttributeError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


@cache
def _source(name: str) -> bytes:
    """Return what a module's file held when it was first asked for: a file that is edited later is not what runs."""
    return _known_file(name).read_bytes()


def _file(name: str) -> Path | None:
    loaded = getattr(sys.modules.get(name), "__file__", None)
    file = Path(loaded) if loaded else _origin(name)
    return file if file is not None and file.suffix == ".py" and file.is_file() else None


def _known_file(name: str) -> Path:
    file = _file(name)
    assert file is not None
    return file
