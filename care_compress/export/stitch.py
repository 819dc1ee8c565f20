"""One file of care_compress.device, because a board has no pip: ``care_deploy.py``.

The modules that a kind of runtime needs are put one after the other in the order of their imports.
Their source stays as it is, comments included; only the imports are gathered at the top. Whatever
cannot be joined that way (two modules with one name, a module used as an object) is a mistake of
ours and fails here.
"""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEVICE = Path(__file__).resolve().parent.parent / "device"
_PACKAGE = "care_compress.device"

Runtime = Literal["tensorrt", "cpu"]
# The module that ends each script, and what the script says of itself.
_LAST: dict[Runtime, str] = {"tensorrt": "app", "cpu": "cpu_app"}
_ABOUT: dict[Runtime, str] = {
    "tensorrt": """\
care_deploy.py: build, verify and measure the TensorRT engines of this bundle, on this device.

    python3 care_deploy.py build      make int8.engine and fp16.engine for this GPU
    python3 care_deploy.py verify     compare their answers with the exported ones
    python3 care_deploy.py bench      measure their latency
    python3 care_deploy.py infer cat.jpg
    python3 care_deploy.py info

It needs Python 3.10, numpy and TensorRT, which JetPack brings. `infer` needs Pillow as well.""",
    "cpu": """\
care_deploy.py: verify and measure the models of this bundle, on this processor.

    python3 care_deploy.py verify     compare their answers with the exported ones
    python3 care_deploy.py bench      measure their latency
    python3 care_deploy.py infer cat.jpg
    python3 care_deploy.py info

It needs Python 3.10, numpy and the runtime that manifest.json names. `infer` needs Pillow, too.""",
}
_NUMPY: dict[Runtime, str] = {
    "tensorrt": "sudo apt install python3-numpy",
    "cpu": "python3 -m pip install numpy",
}

_HEADER = '''#!/usr/bin/env python3
"""{about}
Made from the modules of care_compress.device: change them, not this file.
"""

# numpy 1.21 of JetPack 6 cannot evaluate our annotations.
from __future__ import annotations

import sys

if sys.version_info < (3, 10):
    sys.exit("care_deploy.py needs Python 3.10 or later. Fix: python3.10 care_deploy.py ...")
'''
_NUMPY_GUARD = """try:
    import numpy as np
except ImportError:
    sys.exit("care_deploy.py needs numpy. Fix: {fix}")
"""


@dataclass(frozen=True)
class Part:
    """One module, taken apart."""

    name: str
    imports: frozenset[tuple[str, str]]  # of the standard library: (module, name or "")
    needs: tuple[str, ...]  # modules of the package
    names: frozenset[str]  # what it defines at the top level
    body: str


def stitch(runtime: Runtime) -> str:
    """The source of care_deploy.py for one kind of runtime; the same modules give the same text."""
    parts = {
        path.stem: read_part(path.stem, path.read_text(encoding="utf-8"))
        for path in sorted(DEVICE.glob("*.py"))
        if path.stem != "__init__"
    }
    check_use(parts, _LAST.values())
    header = _HEADER.format(about=_ABOUT[runtime]).rstrip()
    guard = _NUMPY_GUARD.format(fix=_NUMPY[runtime]).rstrip()
    return join_parts(parts, _LAST[runtime], header, guard)


def join_parts(parts: Mapping[str, Part], last: str, header: str = "", guard: str = "") -> str:
    """Join what `last` needs, `last` at the end; `guard` stands behind the imports."""
    ordered = [parts[name] for name in _in_order(parts, last)]
    _check_names(ordered)
    imports = "\n".join(_import_lines(ordered))
    sections = [header, imports, guard]
    sections += [f"# ---- {part.name} ----\n#\n{part.body}" for part in ordered]
    return "\n\n\n".join(sections) + "\n"


def check_use(parts: Mapping[str, Part], last: Iterable[str]) -> None:
    """Every module is in one of the scripts, or it is dead."""
    used = {name for end in last for name in _in_order(parts, end)}
    assert used == set(parts), f"no one imports {set(parts) - used}"


def _import_lines(parts: Iterable[Part]) -> list[str]:
    wanted: dict[str, set[str]] = {}
    for module, name in sorted(set().union(*(part.imports for part in parts))):
        wanted.setdefault(module, set()).add(name)
    plain = [f"import {module}" for module in wanted if "" in wanted[module] and module != "sys"]
    named = [
        f"from {module} import {', '.join(sorted(names - {''}))}"
        for module, names in wanted.items()
        if names != {""}
    ]
    return plain + named


def read_part(name: str, source: str) -> Part:
    """Take one module apart: its imports, what it defines, and the rest of its text."""
    tree = ast.parse(source)
    lines = source.splitlines()
    imports: set[tuple[str, str]] = set()
    needs: list[str] = []
    names: set[str] = set()
    about = ast.get_docstring(tree) or ""
    for index, node in enumerate(tree.body):
        docstring = index == 0 and isinstance(node, ast.Expr)
        if isinstance(node, ast.Import | ast.ImportFrom):
            needs += _read_import(name, node, imports)
        elif not docstring:
            names.update(_defined(node))
            continue
        assert node.end_lineno is not None
        for line in range(node.lineno - 1, node.end_lineno):
            lines[line] = ""
    comment = "\n".join(f"# {line}".rstrip() for line in about.splitlines())
    body = comment + "\n\n" + "\n".join(lines).strip()
    return Part(name, frozenset(imports), tuple(needs), frozenset(names), body)


def _read_import(
    name: str, node: ast.Import | ast.ImportFrom, imports: set[tuple[str, str]]
) -> list[str]:
    """Note a standard import in `imports`; return the modules of the package it needs."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            assert not alias.name.startswith("care_compress"), f"{name} imports a module as a name"
            if alias.name != "numpy":
                assert alias.asname is None, f"{name} renames {alias.name}"
                imports.add((alias.name, ""))
        return []
    module = node.module or ""
    assert all(alias.asname is None for alias in node.names), f"{name} renames what it imports"
    if module.startswith(_PACKAGE + "."):
        return [module.removeprefix(_PACKAGE + ".")]
    assert node.level == 0 and not module.startswith("care_compress"), f"{name} imports {module}"
    imports.update((module, alias.name) for alias in node.names)
    return []


def _defined(node: ast.stmt) -> Iterable[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    assert isinstance(node, ast.If), f"line {node.lineno}: cannot stitch {type(node).__name__}"
    return []


def _check_names(parts: Iterable[Part]) -> None:
    owner: dict[str, str] = {}
    for part in parts:
        imported = {name or module for module, name in part.imports}
        # An import may be shared; any other name belongs to one module alone.
        for name, kind in [
            *((name, "an import") for name in sorted(imported)),
            *((name, part.name) for name in sorted(part.names)),
        ]:
            other = owner.setdefault(name, kind)
            assert other == kind, f"{name} is defined by {other} and by {kind}"


def _in_order(parts: Mapping[str, Part], last: str) -> list[str]:
    ordered: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"modules import each other: {' -> '.join([*path, name])}"
        if name in ordered:
            return
        for need in parts[name].needs:
            visit(need, (*path, name))
        ordered.append(name)

    visit(last, ())
    return ordered
