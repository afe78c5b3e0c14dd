"""The shape of the package: imports only go down, foreign libraries stay in their one place, the core stays pure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import kvbaton

ROOT = Path(kvbaton.__file__).parent

#: From the bottom up. A module may import from its own layer and from the ones above it in this list.
LAYERS = (
    ("errors",),
    ("layout",),
    ("table",),
    ("plan", "runs", "compatibility", "verify"),
    ("costs",),
    ("staging",),
    ("messages", "layout_file"),
    ("control.base", "transports.base"),
    ("protocol",),
    ("control", "transports"),
    ("runtime",),
    ("manager",),
    ("models", "evaluation", "explain"),
    ("engine",),
    ("adapters",),
    ("server",),
    ("testing", "bench", "demo", "chaos", "soak", "conformance"),
    ("cli",),
)
CORE = (
    "errors",
    "layout",
    "table",
    "plan",
    "runs",
    "compatibility",
    "verify",
    "costs",
    "staging",
    "messages",
    "protocol",
)
IMPURE = {"threading", "socket", "time", "os", "logging", "asyncio", "subprocess", "torch", "zmq", "random"}

#: Where a library may be imported, by package prefix below kvbaton.
HOMES = {
    "nixl_cu12": ("transports.nixl", "bench.leanest"),
    "zmq": ("control", "testing"),
    "torch": ("engine", "conformance", "runtime.gather_torch"),
    "transformers": ("engine", "conformance"),
    "prometheus_client": ("server", "runtime"),
    "matplotlib": ("bench.plot",),
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text(), str(path))


def imports(tree: ast.Module, *, eager_only: bool = False) -> Iterator[str]:
    """Full names of everything a module imports; with ``eager_only`` what it imports when it is imported."""
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if eager_only and id(node) in lazy:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def layer_of(module: str) -> int | None:
    """The layer with the longest name that the module is in."""
    best: tuple[int, int] | None = None
    for number, names in enumerate(LAYERS):
        for name in names:
            if (module == name or module.startswith(name + ".")) and (best is None or len(name) > best[0]):
                best = (len(name), number)
    return best[1] if best else None


def test_every_module_has_a_layer() -> None:
    homeless = [name for name, _ in modules() if name not in ("", "__init__") and layer_of(name) is None]
    assert not homeless, f"name a layer for {homeless}"


def test_imports_only_go_down() -> None:
    wrong = []
    for name, tree in modules():
        mine = layer_of(name)
        for imported in imports(tree):
            theirs = layer_of(imported.removeprefix("kvbaton.")) if imported.startswith("kvbaton.") else None
            if mine is not None and theirs is not None and theirs > mine:
                wrong.append(f"{name} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_the_core_is_pure() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, tree in modules()
        if name.split(".")[0] in CORE
        for imported in imports(tree)
        if imported.split(".")[0] in IMPURE
    ]
    assert not wrong, "\n".join(wrong)


def test_libraries_stay_in_their_place() -> None:
    wrong = []
    for name, tree in modules():
        for imported in imports(tree):
            homes = HOMES.get(imported.split(".")[0])
            if homes is not None and not any(name == home or name.startswith(home + ".") for home in homes):
                wrong.append(f"{name} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_importing_the_facade_needs_only_core_dependencies() -> None:
    """Whoever embeds kvbaton imports ``manager``; nothing behind it may need an extra."""
    trees = dict(modules())
    seen, todo, foreign = set(), ["manager", "transports", "control.zmq"], set()
    while todo:
        name = todo.pop()
        if name in seen or name not in trees:
            continue
        seen.add(name)
        for imported in imports(trees[name], eager_only=True):
            if imported.startswith("kvbaton."):
                todo.append(imported.removeprefix("kvbaton."))
            else:
                foreign.add(imported.split(".")[0])
    assert not foreign & {"torch", "transformers", "aiohttp", "rich", "nixl_cu12"}, foreign


def test_no_pickle_and_no_sleep_where_it_matters() -> None:
    pickles = [name for name, tree in modules() if any(i.split(".")[0] in ("pickle", "marshal") for i in imports(tree))]
    assert not pickles
