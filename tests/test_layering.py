"""The shape of the source tree: arrows between layers, sizes of files, a README for every folder.

The arrows are those of the #include lines; CMake's link lines state the same ones, and a missing
link line fails the build by itself.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "trainer_bridge", "rollout")
FOLDERS = (*LAYERS, "configs", "examples", "tests")

# Folder -> prefixes that its files may include; the longest folder that fits a file counts.
ARROWS = {
    "kernels": ("kernels/",),
    "trainer_bridge": ("trainer_bridge/", "kernels/base/"),
    "trainer_bridge/contract": ("trainer_bridge/contract/", "kernels/base/"),
    "rollout": ("rollout/", "trainer_bridge/", "kernels/"),
}
INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]', re.MULTILINE)
MAX_LINES = 600
MAX_COLUMNS = 100
SOURCES = {".cc", ".h", ".cu", ".cuh", ".py", ".sh", ".yaml"}


def is_generated(path: Path) -> bool:
    """Whether a folder on the way was made by a tool: caches, build metadata."""
    parts = path.relative_to(ROOT).parts
    return any(p.startswith(".") or p == "__pycache__" or p.endswith(".egg-info") for p in parts)


def files_below(folder: str) -> list[Path]:
    files = [f for f in (ROOT / folder).rglob("*") if f.is_file() and not is_generated(f)]
    return sorted(f for f in files if f.suffix != ".pyc")


def allowed_from(path: str) -> tuple[str, ...]:
    """Prefixes that the file at `path`, relative to the root, may include."""
    fitting = [folder for folder in ARROWS if path.startswith(folder + "/")]
    return ARROWS[max(fitting, key=len)]


def forbidden_includes(path: str, text: str) -> list[str]:
    """Includes of `text` at `path` that are no arrow of ours.

    A quoted path starts at the root of the repository; of the bracketed ones, only those that name
    a folder of ours count.
    """
    found = []
    for quote, name in INCLUDE.findall(text):
        is_ours = quote == '"' or name.split("/")[0] in FOLDERS
        is_plain = ".." not in Path(name).parts
        if is_ours and not (is_plain and name.startswith(allowed_from(path))):
            found.append(name)
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_includes_follow_the_arrows_between_layers(layer: str) -> None:
    sources = [f for f in files_below(layer) if f.suffix in {".cc", ".h", ".cu", ".cuh"}]
    assert sources
    wrong = {}
    for file in sources:
        path = file.relative_to(ROOT).as_posix()
        if names := forbidden_includes(path, file.read_text()):
            wrong[path] = names
    assert not wrong


@pytest.mark.parametrize(
    ("path", "include"),
    [
        ("kernels/cpu/a.cc", '"rollout/model/transformer.h"'),
        ("kernels/base/a.h", '"trainer_bridge/wire/frame.h"'),
        ("kernels/a.h", "<trainer_bridge/wire/frame.h>"),
        ("trainer_bridge/wire/a.cc", '"kernels/backend.h"'),
        ("trainer_bridge/wire/a.cc", '"kernels/base/../backend.h"'),
        ("trainer_bridge/wire/a.cc", '"rollout/config/config.h"'),
        ("trainer_bridge/contract/a.h", '"trainer_bridge/wire/frame.h"'),
        ("rollout/engine/a.cc", '"tests/kernels/rig.h"'),
        ("rollout/engine/a.cc", '"engine.h"'),
    ],
)
def test_every_other_arrow_is_found(path: str, include: str) -> None:
    assert forbidden_includes(path, f"#pragma once\n#  include {include}\n")


@pytest.mark.parametrize(
    ("path", "include"),
    [
        ("kernels/cpu/a.cc", '"kernels/base/error.h"'),
        ("kernels/cpu/a.cc", "<vector>"),
        ("trainer_bridge/contract/a.h", '"kernels/base/error.h"'),
        ("trainer_bridge/wire/a.cc", '"trainer_bridge/contract/sample.h"'),
        ("rollout/engine/a.cc", '"kernels/backend.h"'),
        ("rollout/engine/a.cc", '"trainer_bridge/contract/sample.h"'),
    ],
)
def test_the_arrows_of_the_design_are_allowed(path: str, include: str) -> None:
    assert not forbidden_includes(path, f"#include {include}\n")


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_and_lines_keep_their_limits(folder: str) -> None:
    too_big = []
    for file in files_below(folder):
        if file.suffix not in SOURCES and file.name != "CMakeLists.txt":
            continue
        lines = file.read_text(encoding="utf-8").splitlines()
        path = file.relative_to(ROOT).as_posix()
        if len(lines) > MAX_LINES:
            too_big.append(f"{path}: {len(lines)} lines")
        too_big += [
            f"{path}:{number}: {len(line)} columns"
            for number, line in enumerate(lines, 1)
            if len(line) > MAX_COLUMNS
        ]
    assert not too_big


def mirrored(test_folder: Path) -> Path:
    """The source folder that a folder of tests stands for; a layer's own folder has none."""
    parts = test_folder.relative_to(ROOT / "tests").parts
    return ROOT.joinpath(*parts) if len(parts) > 1 else ROOT / "no such folder"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_has_a_readme(folder: str) -> None:
    folders = {ROOT / folder}
    for file in files_below(folder):
        folders |= {p for p in file.parents if p.is_relative_to(ROOT / folder)}
    # tests/LAYER/FOLDER mirrors LAYER/FOLDER, whose README describes what is tested there.
    folders -= {p for p in folders if folder == "tests" and mirrored(p).is_dir()}
    # A folder of inputs holds nothing else; corpus/README.md speaks for all of them.
    folders -= {p for p in folders if p.parent == ROOT / "tests" / "fuzz" / "corpus"}
    missing = [f for f in folders if not (f / "README.md").is_file()]
    assert not sorted(f.relative_to(ROOT).as_posix() for f in missing)
