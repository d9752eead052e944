"""Generates hicache/rpc/pb from the .proto files in this folder, or checks that it is up to date.

Run it through `make protos` and `make protos-check`, which provide the pinned compiler. The compiler writes
absolute imports after the proto package (`from hicache.v1 import x_pb2`); they are rewritten to relative
imports, since the modules stand side by side in hicache.rpc.pb. SOURCES.sha256 records what they came from.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
PACKAGE = Path("hicache/v1")
TARGET = PROTOS.parent / "hicache" / "rpc" / "pb"
SOURCES = "SOURCES.sha256"
INIT = '"""Messages and service stubs of package hicache.v1, generated from protos/ by `make protos`."""\n'


def main() -> int:
    """Generates or checks; answers the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail where the output would change"
    )
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        fresh = generate(Path(scratch))
        if check:
            return report(stale(fresh))
        install(fresh)
    print(f"[protos] wrote {TARGET.relative_to(PROTOS.parent)}")
    return 0


def generate(scratch: Path) -> Path:
    """Compiles every .proto file into `scratch`; answers the folder that hicache/rpc/pb must equal."""
    protos = sorted((PROTOS / PACKAGE).glob("*.proto"))
    if not protos:
        sys.exit(f"no .proto files in {PROTOS / PACKAGE}")
    out = [f"--{kind}_out={scratch}" for kind in ("python", "pyi", "grpc_python")]
    names = [str(proto.relative_to(PROTOS)) for proto in protos]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *out, *names]
    subprocess.run(command, check=True, cwd=PROTOS)
    fresh = scratch / PACKAGE
    for module in fresh.iterdir():
        module.write_text(relative_imports(module.read_text()))
    (fresh / "__init__.py").write_text(INIT)
    (fresh / SOURCES).write_text(
        "".join(f"{digest(proto)}  {proto.relative_to(PROTOS)}\n" for proto in protos)
    )
    return fresh


def relative_imports(text: str) -> str:
    """Rewrites `from hicache.v1 import x_pb2 ...` to `from . import x_pb2 ...`."""
    return re.sub(rf"^from {'.'.join(PACKAGE.parts)} import ", "from . import ", text, flags=re.MULTILINE)


def digest(proto: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(proto.read_bytes()).hexdigest()


def names_in(folder: Path) -> set[str]:
    """The names of the files in a folder that may not exist."""
    return {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()


def stale(fresh: Path) -> list[str]:
    """The names of files in hicache/rpc/pb that are missing, superfluous or different."""
    names = names_in(fresh) | names_in(TARGET)
    _, different, unreadable = filecmp.cmpfiles(fresh, TARGET, names, shallow=False)
    return sorted(different + unreadable)


def report(names: list[str]) -> int:
    """Prints the verdict of a check; answers the exit status."""
    if not names:
        print("[protos] generated code is up to date")
        return 0
    print(f"[protos] stale, run `make protos`: {', '.join(names)}", file=sys.stderr)
    return 1


def install(fresh: Path) -> None:
    """Makes hicache/rpc/pb hold exactly the files of `fresh`."""
    TARGET.mkdir(parents=True, exist_ok=True)
    for name in names_in(TARGET) - names_in(fresh):
        (TARGET / name).unlink()
    for name in names_in(fresh):
        shutil.copyfile(fresh / name, TARGET / name)


if __name__ == "__main__":
    sys.exit(main())
