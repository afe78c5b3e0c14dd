"""What is said about a wheel, and how its metadata is read; ``make wheel`` does it to the real one."""

from __future__ import annotations

import zipfile
from pathlib import Path

from lab.wheel import MAX_BYTES, MUST_HAVE, NEEDS, contents, faults

RIGHT = ["kvbaton/__init__.py", *MUST_HAVE, "kvbaton-0.1.0.dist-info/METADATA"]


def test_a_wheel_that_is_right_has_no_faults() -> None:
    assert faults(RIGHT, set(NEEDS), MAX_BYTES, 0.1) == []


def test_every_fault_is_named() -> None:
    found = faults(["kvbaton/py.typed", "lab/wheel.py", "tests/conftest.py"], {"torch", *NEEDS}, MAX_BYTES + 1, 1.0)
    for fault in (
        "lab/wheel.py does not belong",
        "tests/conftest.py does not belong",
        "model.safetensors is missing",
        "it needs ['msgspec', 'numpy', 'pyzmq', 'torch']",
        "bytes, more than",
        "import kvbaton takes 1.00 s",
    ):
        assert any(fault in line for line in found), (fault, found)


def test_what_is_needed_without_an_extra_is_read_from_the_metadata(tmp_path: Path) -> None:
    lines = ("Metadata-Version: 2.4", "Requires-Dist: msgspec>=0.19", "Requires-Dist: numpy<3,>=2")
    extra = ('Requires-Dist: torch==2.13.0; extra == "serve"', "Requires-Dist: pyzmq")
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("kvbaton-0.1.0.dist-info/METADATA", "\n".join([*lines, *extra, "", "about"]))
    assert contents(tmp_path / "a.whl") == (["kvbaton-0.1.0.dist-info/METADATA"], NEEDS)
