"""Compiled kernels to carry to a machine with a GPU: every kernel of a run, compiled here for sm_90 through the stub
driver, packed into one small archive, and unpacked where the run is.

    python -m benchmarks.gpu.cache [--parts b,d] [ARCHIVE]      make one (minutes on few cores)

A kernel is found again by what Triton hashes: its source, the signature with its constants and alignments, the
options, the target (cuda, 90, 32 threads a warp), and every file of Triton itself, its compiled library included.  So
an archive is of use only with the same Triton wheel for the same Python version.  Of each kernel the binary and its
description are kept; Triton notes absolute paths, which are written anew where it is unpacked.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import os
import sys
import tarfile
import tempfile
from pathlib import Path

from benchmarks.gpu.conduct import ROOT, Plan, conduct
from benchmarks.gpu.folder import Folder
from benchmarks.gpu.steps import chosen

ARCHIVE = ROOT / "build" / "gpu-cache.tar.xz"
KEPT = (".json", ".cubin", ".so")
GROUP = "__grp__"
HERE = "@"
"""Stands in an archive for the folder of a kernel."""


def pack(cache: Path, archive: Path) -> int:
    """A cache folder of Triton's -> an archive, by rename; returns how many kernels it holds."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    new = archive.with_suffix(".new")
    kernels = 0
    with lzma.open(new, "wb", preset=6) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for path in sorted(x for x in cache.glob("*/*") if x.is_file()):
            if path.suffix not in KEPT or path.name.startswith("libcuda"):
                continue
            data = path.read_bytes()
            if path.name.startswith(GROUP):
                kernels += 1
                names = [name for name in json.loads(data)["child_paths"] if Path(name).suffix in KEPT]
                data = json.dumps({"child_paths": {name: f"{HERE}/{name}" for name in names}}).encode()
            member = tarfile.TarInfo(f"{path.parent.name}/{path.name}")
            member.size, member.mode = len(data), 0o755 if path.suffix == ".so" else 0o644
            tar.addfile(member, io.BytesIO(data))
    new.replace(archive)
    return kernels


def unpack(archive: Path, cache: Path) -> int:
    """The inverse, beside what the folder has; returns how many kernels were unpacked."""
    kernels = 0
    with lzma.open(archive, "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            path = cache / member.name
            if not member.isfile() or cache.resolve() not in path.resolve().parents:
                raise ValueError(f"{archive} is no archive of compiled kernels: it holds {member.name!r}")
            stored = tar.extractfile(member)
            assert stored is not None
            data = stored.read()
            if path.name.startswith(GROUP):
                kernels += 1
                names = json.loads(data)["child_paths"]
                data = json.dumps(
                    {"child_paths": {name: str(path.parent.absolute() / name) for name in names}}
                ).encode()
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f"{path.name}.new{os.getpid()}")
            new.write_bytes(data)
            new.chmod(member.mode)
            new.replace(path)
    return kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", nargs="?", type=Path, default=ARCHIVE)
    parser.add_argument("--parts", default="b,c,speed", help="steps whose kernels are compiled")
    parser.add_argument("--cache", type=Path, help="folder to compile into (default: a temporary one); kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cache = (arguments.cache or Path(temporary, "triton")).resolve()
        os.environ["TRITON_CACHE_DIR"] = str(cache)
        folder = Folder(Path(temporary, "out"))
        plan = Plan(chosen(arguments.parts), 86400.0, dry=True, again=True, everything=True)
        ended_well = conduct(plan, folder, lambda line: print(line, flush=True), lambda: None)
        if not ended_well:
            print((folder.path / "log.txt").read_text(errors="replace")[-4000:], file=sys.stderr)
        kernels = pack(cache, arguments.archive)
    print(f"{arguments.archive}: {kernels} kernels, {arguments.archive.stat().st_size / 1e6:.1f} MB")
    return not ended_well


if __name__ == "__main__":
    sys.exit(main())
