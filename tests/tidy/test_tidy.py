"""The house rules that no linter knows, as tests. They need the standard library and pytest only."""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "hicache" / "rpc" / "pb"

FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60
CLASS_METHODS_MAX = 20
POSITIONAL_ARGS_MAX = 5

# "file:function" -> why it may catch everything. Only loop and RPC edges belong here; each must report
# what it caught.
BROAD_HANDLERS: dict[str, str] = {
    "hicache/device/copying/jobs.py:_caught": "a copying thread's edge: the job ends with it; nobody waits for ever",
    "hicache/device/host_mover.py:HostMover._advance": "a mover's step: the transfer ends with FAULT, others go on",
    "hicache/device/kv_lane.py:KvLane._advance": "a lane's step: the transfer ends with FAULT, others go on",
    "hicache/integrations/vllm/loads.py:Load._guard": "a thread's edge: the load fails, the engine computes its blocks",
    "hicache/rpc/server/edge.py:Edge.guard": "the RPC edge: logged with the request id, answered INTERNAL",
    "hicache/runtime/loop.py:EngineLoop._step": "the loop's edge: the service fails and says so",
    "hicache/sim/traces/formats.py:with_tokenizer": "the package raises bare Exception; answered as ConfigError",
    "hicache/tier/encoder.py:Encoder._run": "a worker's loop edge: the batch completes with FAULT",
    "hicache/tier/host.py:_run": "a worker's loop edge: the batch completes with FAULT",
    "hicache/tier/isolation.py:_serve": "a process's edge: told to its parent",
    "hicache/tier/reader.py:Readers._run": "a worker's loop edge: the batch completes with FAULT",
    "hicache/tier/attempts.py:Attempts.run": "the writer's edge: what was in the transaction completes with FAULT",
}

CLOCK_FILE = "hicache/runtime/clock.py"
ENVIRONMENT_FILE = "hicache/cli/config.py"
CLOCK_READS = {
    f"time.{name}{unit}"
    for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time")
    for unit in ("", "_ns")
} | {
    f"{owner}.{name}"
    for owner in ("datetime.datetime", "datetime.date", "datetime")
    for name in ("now", "utcnow", "today")
}
ENVIRONMENT_READS = {"os.environ", "os.environb", "os.getenv", "os.getenvb"}

# Where imports may start: what a user runs or imports. Everything else must be reached from here.
DOORS = (
    "hicache",
    "hicache.sim.flat",  # truth: benches and tests hold the policies against other simulators
    "hicache.sim.leaf",
    "hicache.sim.oracle",
    "hicache.__main__",
    "hicache.aio",
    "hicache.client",
    "hicache.cli.main",
    "hicache.rpc.client",
)
DOORS_OPEN_WHOLE = ("hicache.integrations",)  # each adapter is imported by its engine, by name
KERNEL_DOOR = "hicache.device.kernels"


class Source(NamedTuple):
    """One file of ours, read and parsed once."""

    name: str  # relative to the checkout, with forward slashes
    text: str
    tree: ast.Module


@functools.cache
def sources() -> tuple[Source, ...]:
    found = []
    for top in ("hicache", "kernels"):
        for path in sorted((ROOT / top).rglob("*.py")):
            if not path.is_relative_to(GENERATED):
                text = path.read_text(encoding="utf-8")
                found.append(Source(path.relative_to(ROOT).as_posix(), text, ast.parse(text)))
    return tuple(found)


def functions(source: Source) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [
        node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    return [ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list]


def test_the_package_is_where_these_tests_look() -> None:
    assert any(source.name == "hicache/__init__.py" for source in sources())


def test_files_are_short() -> None:
    long = [f"{s.name}: {n} lines" for s in sources() if (n := len(s.text.splitlines())) > FILE_LINES_MAX]
    assert not long, f"split these files (at most {FILE_LINES_MAX} lines): {long}"


def test_functions_are_short() -> None:
    long = [
        f"{s.name}:{f.lineno} {f.name}: {n} lines"
        for s in sources()
        for f in functions(s)
        if (n := f.end_lineno - f.lineno + 1) > FUNCTION_LINES_MAX
    ]
    assert not long, f"split these functions (at most {FUNCTION_LINES_MAX} lines): {long}"


def is_method_proper(node: ast.stmt) -> bool:
    """Whether a class member counts: neither a magic method nor a property nor an overload's signature."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    names = {decorator.rpartition(".")[2] for decorator in decorators(node)}
    return not (node.name.startswith("__") or names & {"property", "cached_property", "setter", "overload"})


def test_classes_have_few_methods() -> None:
    large = [
        f"{s.name}:{c.lineno} {c.name}: {n} methods"
        for s in sources()
        for c in ast.walk(s.tree)
        if isinstance(c, ast.ClassDef) and (n := sum(map(is_method_proper, c.body))) > CLASS_METHODS_MAX
    ]
    assert not large, f"split these classes (at most {CLASS_METHODS_MAX} methods): {large}"


def positional_arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = [arg.arg for arg in node.args.posonlyargs + node.args.args]
    return len(names) - (bool(names) and names[0] in {"self", "cls"})


def test_functions_take_few_positional_arguments() -> None:
    wide = [
        f"{s.name}:{f.lineno} {f.name}: {n}"
        for s in sources()
        for f in functions(s)
        if (n := positional_arguments(f)) > POSITIONAL_ARGS_MAX
        # a kernel's launch signature is a flat list of pointers and strides, not an interface for people
        and not any("jit" in decorator for decorator in decorators(f))
    ]
    assert not wide, f"make arguments keyword-only (at most {POSITIONAL_ARGS_MAX} positional): {wide}"


def catches_everything(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(ast.unparse(kind) in {"Exception", "BaseException"} for kind in types)


def broad_handlers(node: ast.AST, scope: str, separator: str = ":") -> set[str]:
    """Names "file:Class.function" for every handler below `node` that catches everything."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ExceptHandler) and catches_everything(child):
            found.add(scope)
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found |= broad_handlers(child, f"{scope}{separator}{child.name}", ".")
        else:
            found |= broad_handlers(child, scope, separator)
    return found


def test_broad_handlers_stand_at_listed_edges_only() -> None:
    found = {name for source in sources() for name in broad_handlers(source.tree, source.name)}
    assert not found - BROAD_HANDLERS.keys(), (
        f"catch what you expect: {sorted(found - BROAD_HANDLERS.keys())}"
    )
    assert not BROAD_HANDLERS.keys() - found, f"no longer there: {sorted(BROAD_HANDLERS.keys() - found)}"


def test_nothing_is_left_unfinished() -> None:
    marker = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b")
    left = [
        f"{source.name}:{number}: {line.strip()}"
        for source in sources()
        for number, line in enumerate(source.text.splitlines(), 1)
        if marker.search(line)
    ]
    assert not left, f"finish these: {left}"


def imported_names(tree: ast.Module) -> dict[str, str]:
    """What each name bound by an import stands for, for example {"now": "time.monotonic"}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def reads(source: Source, forbidden: set[str]) -> list[str]:
    """Uses of forbidden functions, under whatever name they were imported."""
    names = imported_names(source.tree)
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name | ast.Attribute):
            head, dot, rest = ast.unparse(node).partition(".")
            if names.get(head, head) + dot + rest in forbidden:
                found.append(f"{source.name}:{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    ("forbidden", "home"),
    [
        pytest.param(CLOCK_READS, CLOCK_FILE, id="clock"),
        pytest.param(ENVIRONMENT_READS, ENVIRONMENT_FILE, id="environment"),
    ],
)
def test_one_file_reads_it(forbidden: set[str], home: str) -> None:
    found = [read for source in sources() if source.name != home for read in reads(source, forbidden)]
    assert not found, f"take it as an argument; only {home} reads it: {found}"


@pytest.mark.parametrize(
    "text",
    [
        "import time\ntime.monotonic()",
        "import time as t\nt.time_ns()",
        "from time import perf_counter as now\nnow()",
        "import datetime\ndatetime.datetime.now()",
        "from datetime import datetime\ndatetime.now()",
        "import os\nos.environ['A']",
        "from os import getenv\ngetenv('A')",
    ],
    ids=lambda text: text.splitlines()[1],
)
def test_a_read_is_found_under_any_name(text: str) -> None:
    assert reads(Source("example.py", text, ast.parse(text)), CLOCK_READS | ENVIRONMENT_READS)


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def mentioned_modules(source: Source) -> set[str]:
    """Dotted names that a module may import: import statements, and names in strings (lazy imports)."""
    package = module_name(source.name).split(".")
    if not source.name.endswith("/__init__.py"):
        package.pop()
    found: set[str] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("hicache.")
        ):
            found.add(node.value)
    return found


def test_every_module_is_reachable() -> None:
    modules = {module_name(s.name): s for s in sources() if s.name.startswith("hicache/")}
    waiting = [door for door in (*DOORS, KERNEL_DOOR) if door in modules]
    waiting += [name for name in modules if name.startswith(DOORS_OPEN_WHOLE)]
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in modules and name not in reached:
            reached.add(name)
            waiting.append(name.rpartition(".")[0])  # importing a module imports the packages it stands in
            waiting.extend(mentioned_modules(modules[name]))
    assert not modules.keys() - reached, f"nothing imports these: {sorted(modules.keys() - reached)}"


def test_helpers_of_tests_have_names_of_their_own() -> None:
    """One process runs all folders' tests: of two helper modules of one name, all would import the first."""
    helpers = [
        path
        for path in (ROOT / "tests").rglob("*.py")
        if not path.name.startswith("test_") and path.name != "conftest.py"
    ]
    homes: dict[str, list[str]] = {}
    for path in sorted(helpers):
        homes.setdefault(path.stem, []).append(path.relative_to(ROOT).as_posix())
    assert len(homes) > 10
    assert not [found for found in homes.values() if len(found) > 1]


def headings(page: Path) -> set[str]:
    """The anchors that a Markdown page offers, spelled as GitHub spells them."""
    titles = re.findall(r"^#+ +(.+?) *$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(<?([^)>\s]+)>?[^)]*\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in headings(target)):
            broken.append(f"{page.relative_to(ROOT)}: {link}")
    return broken


def test_links_in_documents_have_targets() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/**/*.md")]
    # folders whose names begin with a dot hold environments and caches
    ours = [
        page for page in sorted(pages) if not any(p.startswith(".") for p in page.relative_to(ROOT).parts)
    ]
    broken = [link for page in ours for link in broken_links(page)]
    assert not broken, f"no such target: {broken}"


def test_generated_code_is_from_these_protos() -> None:
    protos = {
        path.relative_to(ROOT / "protos").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (ROOT / "protos").rglob("*.proto")
    }
    recorded_in = GENERATED / "SOURCES.sha256"
    lines = recorded_in.read_text(encoding="utf-8").splitlines() if recorded_in.exists() else []
    recorded = {name: digest for digest, name in (line.split() for line in lines)}
    assert recorded == protos, "run `make protos`"
