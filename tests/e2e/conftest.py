"""Fixtures of the end-to-end tests: the program must be built and SmolLM2 exported beforehand."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterator

import pytest
from engine_process import BINARY, MODEL, shared_files, wait_for_no_new_files
from recovery_rig import MODEL as SMALL_MODEL
from tiny_models import MODELS


@pytest.fixture(scope="session", autouse=True)
def needs() -> None:
    """Fails at once, and loudly, where there is nothing to test."""
    if not BINARY.is_file():
        pytest.exit(f"{BINARY} is not there: build it (tests/build.sh release) or set "
                    "ROLLPACK_BINARY", returncode=1)
    if not (MODEL / "config.json").is_file():
        pytest.exit(f"{MODEL} is not there: run examples/export_smollm2.py or set ROLLPACK_MODEL",
                    returncode=1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A random Llama of odd sizes whose pad id is its EOS id."""
    return MODELS["llama-untied"].write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A random Llama whose steps take milliseconds."""
    return SMALL_MODEL.write(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(autouse=True)
def leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where files stay in shared memory or in the temporary directory."""
    with tempfile.TemporaryDirectory(prefix="rp-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        before = shared_files()
        yield
        assert not wait_for_no_new_files(before)
