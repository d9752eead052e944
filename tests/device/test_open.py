"""Opening a device: the names, the spec, and life without torch or without the kernels."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hicache.device import DeviceOptions, kernels, open_device
from hicache.errors import ConfigError, InvalidArgumentError, UnsupportedError
from hicache.types import TierKind, TierSpec

SPEC = TierSpec("device", TierKind.DEVICE, 4 << 20, 1 << 20)


@pytest.mark.parametrize("name", ["cuda:999", "cuda:15"])
def test_cuda_devices_that_are_not_there_are_said_to_be_missing(name):
    pytest.importorskip("torch", reason="the device room needs torch")
    with pytest.raises(UnsupportedError, match=r"(has no CUDA|sees \d+ devices).*'cpu'"):
        open_device(name, SPEC, lambda: None)


@pytest.mark.parametrize("name", ["", "gpu", "CPU", "cuda:", "cuda:x", "cpu:0", "mps", "cuda:0 "])
def test_other_names_are_no_devices(name):
    with pytest.raises(InvalidArgumentError, match="known devices"):
        open_device(name, SPEC, lambda: None)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (TierSpec("device", TierKind.DEVICE, 4, 1, keyed=True), DeviceOptions()),
        (TierSpec("device", TierKind.DEVICE, 4, 0), DeviceOptions()),
        (TierSpec("device", TierKind.DEVICE, -1, 1), DeviceOptions()),
        (SPEC, DeviceOptions(staging_bytes=0)),
        (SPEC, DeviceOptions(cuda_staging_bytes=0)),
    ],
)
def test_specs_that_no_device_can_serve_are_refused(spec, options):
    with pytest.raises(InvalidArgumentError, match="tier 'device'"):
        open_device("cpu", spec, lambda: None, options)


def run_without(module: str, code: str) -> str:
    """What a fresh interpreter prints in which a module cannot be imported."""
    block = f"""
        import sys

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == {module!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Block())
    """
    script = textwrap.dedent(block) + textwrap.dedent(code)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_room_imports_without_torch_and_opening_says_what_to_install():
    printed = run_without(
        "torch",
        """
        from hicache.device import open_device
        from hicache.device import kernels
        from hicache.errors import ConfigError
        from hicache.types import TierKind, TierSpec

        try:
            open_device("cpu", TierSpec("device", TierKind.DEVICE, 4096, 4096), lambda: None)
        except ConfigError as error:
            print(error)
        """,
    )
    assert "'cpu' needs torch" in printed
    assert "pip install hicache[torch]" in printed


def test_importing_the_room_loads_neither_torch_nor_numpy():
    printed = run_without(
        "nothing", "import hicache.device, sys; print({'torch', 'numpy'} & set(sys.modules))"
    )
    assert printed.strip() == "set()"


def test_kernels_are_found_beside_the_package_first_then_in_the_checkout(tmp_path, monkeypatch):
    packaged, checkout = tmp_path / "hicache" / "_kernels", tmp_path / "kernels"
    for folder in (packaged, checkout):
        folder.mkdir(parents=True)
        (folder / "probe.py").write_text(f"HERE = {folder.name!r}\n")
    monkeypatch.setattr(kernels, "FOLDERS", (packaged, checkout))
    kernels._load.cache_clear()
    try:
        assert kernels._load("probe").HERE == "_kernels"
        (packaged / "probe.py").unlink()
        kernels._load.cache_clear()
        assert kernels._load("probe").HERE == "kernels"
    finally:
        kernels._load.cache_clear()
        sys.modules.pop("hicache_kernels_probe", None)


def test_missing_kernels_say_where_they_were_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "FOLDERS", (tmp_path / "_kernels", tmp_path / "kernels"))
    with pytest.raises(ConfigError, match=r"no absent\.py in .*_kernels or .*kernels"):
        kernels._load("absent")


def test_the_folders_are_the_packages_and_the_checkouts():
    root = Path(__file__).resolve().parents[2]
    assert (root / "hicache" / "_kernels", root / "kernels") == kernels.FOLDERS
