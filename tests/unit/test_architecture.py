"""The shape of the source: imports only go down, foreign libraries stay in their one place, the core stays pure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import kvbaton
from kvbaton.transports import nixl_package

ROOT = Path(kvbaton.__file__).parent
LAB = Path(__file__).parents[2] / "lab"

#: From the bottom up. A module may import from its own layer and from the ones above it in this list.
LAYERS = (
    ("kvbaton.errors",),
    ("kvbaton.secret",),
    ("kvbaton.layout",),
    ("kvbaton.plan",),
    ("kvbaton.control.base", "kvbaton.transports.base"),
    ("kvbaton.protocol",),
    ("kvbaton.control", "kvbaton.transports"),
    ("kvbaton.discovery",),
    ("kvbaton.runtime",),
    ("kvbaton.pieces",),
    ("kvbaton.handles", "kvbaton.collected", "kvbaton.parts"),
    ("kvbaton.manager", "kvbaton.launch"),
    ("kvbaton.engines", "kvbaton.explain"),
    ("kvbaton.testing", "kvbaton.bench"),
    ("kvbaton",),
    ("kvbaton.engines.vllm", "kvbaton.engines.sglang"),
    ("kvbaton.serving.models", "kvbaton.serving.evaluation"),
    ("kvbaton.serving.engine",),
    ("kvbaton.serving.server",),
    ("kvbaton.serving.router",),
    ("kvbaton.serving",),
    ("kvbaton.cli",),
    ("lab",),
)
CORE = ("kvbaton.errors", "kvbaton.layout", "kvbaton.plan", "kvbaton.protocol")
IMPURE = {"threading", "socket", "time", "os", "logging", "asyncio", "subprocess", "torch", "zmq", "random"}

#: Where a library may be imported, by package.
HOMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        nixl_package.PACKAGES, ()
    ),  # imported by name, whichever there is, by kvbaton.transports.nixl_package
    "zmq": ("kvbaton.control", "kvbaton.testing", "lab.flood.attacker"),
    "torch": (
        "kvbaton.serving.engine",
        "kvbaton.runtime.gather_torch",
        "kvbaton.engines.vllm.memory",
        "kvbaton.launch",
        "lab.conformance",
        "lab.gpu",
        "lab.real",
        "lab.rounds",
        "lab.throughput",
        "lab.sglang.convolutions_on_cpu",
        "lab.training",
    ),
    "transformers": (
        "kvbaton.serving.engine",
        "lab.conformance",
        "lab.layers.measure",
        "lab.real",
        "lab.rounds",
        "lab.training",
        "lab.engines.models",
        "lab.vllm.models",
        "lab.sglang.models",
    ),
    "vllm": (
        "kvbaton.engines.vllm.connector",
        "kvbaton.engines.vllm.memory",
        "kvbaton.engines.vllm.metrics",
    ),
    "sglang": (
        "kvbaton.engines.sglang.backend",
        "kvbaton.engines.sglang.plugin",
        "kvbaton.engines.sglang.rank",
        "lab.sglang.convolutions_on_cpu",
        "lab.sglang.latents_on_cpu",
        "lab.sglang.nixl_on_cpu",
    ),
    "aiohttp": (
        "kvbaton.discovery.client",
        "kvbaton.discovery.connections",
        "kvbaton.discovery.doors",
        "kvbaton.discovery.guard",
        "kvbaton.discovery.listening",
        "kvbaton.discovery.json_response",
        "kvbaton.discovery.server",
        "kvbaton.serving",
        "kvbaton.cli",
        "lab",
    ),
    "prometheus_client": ("kvbaton.serving.server", "kvbaton.engines.sglang.metrics"),
    "matplotlib": ("kvbaton.bench.plot", "lab.layers.plot", "lab.policies.plot"),
}


#: What an import statement may stand in.
HOLDERS = ast.stmt | ast.excepthandler | ast.match_case


@cache
def modules() -> tuple[tuple[str, ast.Module], ...]:
    paths = [(root, path) for root in (ROOT, LAB) for path in sorted(root.rglob("*.py"))]
    return tuple(
        (
            ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__"),
            ast.parse(path.read_text(), str(path)),
        )
        for root, path in paths
    )


def imports(tree: ast.Module, *, eager_only: bool = False) -> Iterator[str]:
    """Full names of everything a module imports; with ``eager_only`` what it imports when it is imported."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if eager_only and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(node)):
            continue
        todo += (
            inner
            for inner in ast.iter_child_nodes(node)
            if isinstance(inner, ast.stmt | ast.excepthandler | ast.match_case)
        )
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer_of(module: str) -> int | None:
    """The layer with the longest name that the module is in; none for what is not ours, and for our version."""
    if module == "kvbaton.__version__":
        return None
    found = [(len(name), number) for number, names in enumerate(LAYERS) for name in names if within(module, name)]
    return max(found)[1] if found else None


def test_every_module_has_a_layer() -> None:
    front = LAYERS.index(("kvbaton",))
    homeless = [name for name, _ in modules() if name != "kvbaton" and layer_of(name) == front]
    assert not homeless, f"name a layer for {homeless}"


def test_imports_only_go_down(capsys: pytest.CaptureFixture[str]) -> None:
    wrong, walked = [], 0
    for name, tree in modules():
        mine = layer_of(name)
        for imported in imports(tree):
            theirs = layer_of(imported)
            walked += theirs is not None
            if mine is not None and theirs is not None and theirs > mine:
                wrong.append(f"{name} imports {imported}")
    with capsys.disabled():
        print(f" {walked} imports of ours, {len(wrong)} upward ", end="")
    assert not wrong, "\n".join(wrong)


def test_the_core_is_pure() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, tree in modules()
        if any(within(name, part) for part in CORE)
        for imported in imports(tree)
        if imported.split(".")[0] in IMPURE
    ]
    assert not wrong, "\n".join(wrong)


def test_libraries_stay_in_their_place() -> None:
    wrong = []
    for name, tree in modules():
        for imported in imports(tree):
            homes = HOMES.get(imported.split(".")[0])
            if homes is not None and not any(within(name, home) for home in homes):
                wrong.append(f"{name} imports {imported}")
    assert not wrong, "\n".join(wrong)


def foreign_of(*names: str) -> set[str]:
    """The libraries that are imported with modules of ours."""
    trees = dict(modules())
    seen, todo, foreign = set(), list(names), set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name not in trees:
            if not within(name, "kvbaton"):
                foreign.add(name.split(".")[0])
            continue
        for imported in imports(trees[name], eager_only=True):
            todo += [imported, imported.rpartition(".")[0] or imported]
    return foreign


def test_importing_the_facade_needs_only_core_dependencies() -> None:
    """Whoever embeds kvbaton imports the front door; nothing behind it may need an extra."""
    foreign = foreign_of("kvbaton", "kvbaton.manager", "kvbaton.transports", "kvbaton.control.zmq")
    assert not foreign & {"torch", "transformers", "aiohttp", "rich", *nixl_package.PACKAGES}, foreign


def test_a_router_computes_nothing() -> None:
    """It starts four times as fast, and in a quarter of the memory, without the libraries of an engine."""
    foreign = foreign_of("kvbaton.cli.router", "kvbaton.serving.router.router")
    assert "aiohttp" in foreign
    assert not foreign & {"torch", "transformers", "tokenizers", *nixl_package.PACKAGES}, foreign


def test_no_pickle_and_no_sleep_where_it_matters() -> None:
    pickles = [name for name, tree in modules() if any(i.split(".")[0] in ("pickle", "marshal") for i in imports(tree))]
    assert not pickles
