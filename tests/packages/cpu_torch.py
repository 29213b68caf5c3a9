#!/usr/bin/env python3
"""Makes a torch without its CUDA packages load: the tests and examples use it on the CPU only.

PyPI's torch for Linux links to 4 GB of CUDA libraries (cuBLAS, cuDNN, NCCL, ..). Nothing calls them
where no GPU is, but without them torch does not load. This writes one small library beside torch's
own, under the name of each: it has every function that torch takes from them, and each returns 100,
the error code of "no device" throughout CUDA. What torch takes is read from its own files, so no
version of it is assumed. The CUDA runtime (3 MB) stays the real one: torch asks it for devices and
for texts of errors. The others are struck from what torch says it requires, or the next pip would
install them.

    cpu_torch.py SITE_PACKAGES           after pip install --no-deps torch
    cpu_torch.py SITE_PACKAGES --undo    before the real packages are installed
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tempfile

NO_DEVICE = 100  # cudaErrorNoDevice, CUDA_ERROR_NO_DEVICE
STAND_IN = "libno_cuda.so"
CUDA_LIBRARY = re.compile(r"lib(cu(?!dart)|nv|nccl)")
CUDA_FUNCTION = re.compile(r"cu[A-Z]|cusparseLt|nccl|nvshmem")
CUDA_REQUIREMENT = re.compile(
    r"Requires-Dist: (cuda-(?!toolkit)|nvidia-(?!cuda-runtime)|triton).*\n")


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loaded_with(library: pathlib.Path) -> tuple[set[pathlib.Path], set[str]]:
    """The libraries of its folder that load with `library`, itself included, and the names of CUDA
    libraries that they need and that are not there."""
    found: set[pathlib.Path] = set()
    absent: set[str] = set()
    waiting = [library]
    while waiting:
        one = waiting.pop()
        if one in found:
            continue
        found.add(one)
        for name in re.findall(r"NEEDED\s+(\S+)", output_of("objdump", "-p", str(one))):
            if (library.parent / name).exists():
                waiting.append(library.parent / name)
            elif CUDA_LIBRARY.match(name):
                absent.add(name)
    return found, absent


def functions_of_cuda(libraries: set[pathlib.Path]) -> dict[str, set[str]]:
    """What `libraries` take from CUDA's: names of functions by symbol version ("": without one)."""
    taken: dict[str, set[str]] = {}
    for library in libraries:
        for symbol in re.findall(r" U (\S+)", output_of("nm", "-D", str(library))):
            name, _, version = symbol.partition("@")
            # A symbol version is the name of a library (libcublas.so.13), or NVSHMEM, or none.
            if CUDA_LIBRARY.match(version) or (version in ("", "NVSHMEM") and
                                               CUDA_FUNCTION.match(name)):
                taken.setdefault(version, set()).add(name)
    return taken


def write_stand_in(path: pathlib.Path, functions: dict[str, set[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, versions = pathlib.Path(folder, "functions.c"), pathlib.Path(folder, "versions")
        names = sorted(set().union(*functions.values()))
        source.write_text("\n".join(f"int {one}(void) {{ return {NO_DEVICE}; }}" for one in names))
        versions.write_text("\n".join(f"{version} {{ {'; '.join(sorted(functions[version]))}; }};"
                                      for version in sorted(functions) if version))
        output_of("gcc", "-shared", "-fPIC", "-w", f"-Wl,--version-script={versions}",
                  "-o", str(path), str(source))


def strike_requirements(site_packages: pathlib.Path) -> None:
    for metadata in site_packages.glob("torch-*.dist-info/METADATA"):
        kept = CUDA_REQUIREMENT.sub("", metadata.read_text())
        metadata.write_text(re.sub(r"(Requires-Dist: cuda-toolkit)\[.*?\]", r"\1[cudart]", kept))


def undo(folder: pathlib.Path) -> None:
    for one in folder.glob("lib*"):
        if one.name == STAND_IN or (one.is_symlink() and str(one.readlink()) == STAND_IN):
            one.unlink()


def main() -> None:
    site_packages = pathlib.Path(sys.argv[1])
    folder = site_packages / "torch" / "lib"
    undo(folder)
    if "--undo" in sys.argv[2:]:
        return
    libraries, absent = loaded_with(folder / "libtorch_python.so")
    if not absent:
        return
    write_stand_in(folder / STAND_IN, functions_of_cuda(libraries))
    for name in absent:
        (folder / name).symlink_to(STAND_IN)
    strike_requirements(site_packages)


if __name__ == "__main__":
    main()
