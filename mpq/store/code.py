"""Which code computes a stage, read off its imports: the part of a key that says who made a table.

A function runs through the modules that it imports, and through those that these import. All of the project's own count, with
the C++ beside them, so that a change in any of them gives a stage another key. What only tells, carries or checks is left out:
it changes no number, and a new sentence shall not measure anything again.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# sentences, redaction, where bytes lie, what a spec may say (its values are keyed themselves), Prefect's wrapping
NUMBERLESS = (
    "mpq.errors",
    "mpq.redaction",
    "mpq.devices",
    "mpq.documents",
    "mpq.caches",
    "mpq.urls",
    "mpq.spec",
    "mpq.models.hashes",
    "mpq.store.entries",
    "mpq.store.transport",
    "mpq.tasks.stage",
    "mpq.tasks.progress",
    "mpq.tasks.device",
)


def code_version(*entries: str | Callable[..., Any]) -> str:
    """A SHA-256 over the source of everything that `entries` run through: modules by name, or functions.

    A function's own text is in it, those of its module's other functions and constants only as far as it uses them.
    """
    digest = hashlib.sha256()
    functions, modules = _reached(entries)
    for text in sorted(functions):
        digest.update(text.encode() + b"\0")
    for name in sorted(modules):
        digest.update(name.encode() + b"\0" + _source(name))
    return digest.hexdigest()


def modules_of(*entries: str | Callable[..., Any]) -> frozenset[str]:
    """The project's modules that `entries` run through, by name."""
    return _reached(entries)[1]


def is_numberless(module: str) -> bool:
    """Whether a module changes no number; what lies in its folder does not either."""
    return any(module == name or module.startswith(f"{name}.") for name in NUMBERLESS)


@cache  # a run asks for each of its many tasks
def _reached(
    entries: tuple[str | Callable[..., Any], ...],
) -> tuple[frozenset[str], frozenset[str]]:
    """The texts of the functions, and the modules."""
    texts: set[str] = set()
    ahead: list[str] = []
    functions: list[Callable[..., Any]] = []
    for entry in entries:
        (ahead if isinstance(entry, str) else functions).append(entry)  # type: ignore[arg-type]
    while functions:
        function = functions.pop()
        text = textwrap.dedent(inspect.getsource(function))
        if text in texts:
            continue
        texts.add(text)
        tree = ast.parse(text)
        ahead += _imported(tree)
        texts |= _constants(tree, function)
        for used in _globals(tree, function):
            where = getattr(used, "__module__", None) or ""
            if where == function.__module__ and inspect.isfunction(used):
                functions.append(used)
            elif where.startswith("mpq."):
                ahead.append(where)
    modules: set[str] = set()
    while ahead:
        name = ahead.pop()
        if name not in modules and not is_numberless(name):
            modules.add(name)
            ahead += _imports_of(name)
    return frozenset(texts), frozenset(modules)


def _globals(tree: ast.AST, function: Callable[..., Any]) -> Iterator[Any]:
    """What a function's text names of its module: functions and classes, those behind a decorator as they were."""
    space = inspect.unwrap(function).__globals__
    for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
        if name in space and (inspect.isroutine(space[name]) or inspect.isclass(space[name])):
            yield inspect.unwrap(space[name])


def _constants(tree: ast.AST, function: Callable[..., Any]) -> set[str]:
    """The statements at the top of a function's module that give names a value which its text uses."""
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    whole = _parsed(inspect.getsourcefile(inspect.unwrap(function)))
    given = (s for s in whole.body if isinstance(s, ast.Assign | ast.AnnAssign))
    return {ast.unparse(s) for s in given if named & _targets(s)}


def _targets(statement: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


@cache
def _parsed(path: str | None) -> ast.Module:
    return ast.parse(Path(path).read_text(encoding="utf-8") if path else "")


@cache
def _imports_of(module: str) -> tuple[str, ...]:
    return tuple(_imported(ast.parse(_file(module).read_text(encoding="utf-8"))))


def _imported(tree: ast.AST) -> Iterator[str]:
    """The project's modules that a text imports, at its top or inside functions; those for type checking alone are none."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        return
    if isinstance(tree, ast.ImportFrom) and (tree.module or "").startswith("mpq"):
        for alias in tree.names:
            inner = f"{tree.module}.{alias.name}"
            yield inner if _is_module(inner) else str(tree.module)
    elif isinstance(tree, ast.Import):
        yield from (a.name for a in tree.names if a.name.startswith("mpq."))
    for child in ast.iter_child_nodes(tree):
        yield from _imported(child)


def _is_module(name: str) -> bool:
    return _spec(name) is not None


def _file(module: str) -> Path:
    spec = _spec(module)
    return Path((spec and spec.origin) or "")


@cache
def _spec(name: str) -> ModuleSpec | None:
    """Where a module lies. Nothing below the top package is imported for it: that would load torch, and a GPU's kernels need
    what a flow's machine may lack.
    """
    parent, _, _ = name.rpartition(".")
    if parent in ("", "mpq"):
        return find_spec(name)
    above = _spec(parent)
    folders = above.submodule_search_locations if above else None
    return PathFinder.find_spec(name, folders) if folders else None


@cache
def _source(module: str) -> bytes:
    """A module's source, and that of the C++ beside it."""
    path = _file(module)
    parts = [path.read_bytes()]
    if (native := path.with_suffix(".cpp")).exists():
        parts += [file.read_bytes() for file in (native, *sorted(path.parent.glob("*.h")))]
    return b"\0".join(parts)
