"""Nothing of kvbaton unpickles, evaluates, or loads what could run: the field's most common hole."""

from __future__ import annotations

import ast
from pathlib import Path

import kvbaton

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {"recv_pyobj", "send_pyobj", "loads_pickle"}


def suspicious(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            found.append(node.func.id)
        elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            found.append(node.attr)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found.append("torch.load")
    return found


def test_no_source_unpickles() -> None:
    sources = list(Path(kvbaton.__file__).parent.rglob("*.py"))
    found = {str(path): suspicious(ast.parse(path.read_text())) for path in sources}
    assert len(found) > 50
    assert {path: what for path, what in found.items() if what} == {}


def test_the_test_can_fail() -> None:
    for code in ("import pickle", "from dill import loads", "eval('1')", "s.recv_pyobj()", "torch.load(f)"):
        assert suspicious(ast.parse(code)) != []
