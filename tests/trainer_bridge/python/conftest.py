"""Fixtures: the package of this checkout, a scripted server, and the C++ server of the build."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(_ROOT / "trainer_bridge" / "python"), str(Path(__file__).parent)]

import rollpack  # noqa: E402

from fake_server import FakeServer  # noqa: E402
from real_server import RealServer, Start  # noqa: E402


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    """A scripted server; its handlers may be changed at any time."""
    fake = FakeServer(str(tmp_path / "s"))
    yield fake
    fake.close()


@pytest.fixture
def client(server: FakeServer) -> Iterator[rollpack.Client]:
    """A client of the scripted server."""
    with rollpack.connect(server.path) as connected:
        yield connected


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers, each on a socket of its own, and checks that they end cleanly."""
    servers: list[RealServer] = []

    def begin(*arguments: str) -> RealServer:
        directory = tmp_path / str(len(servers))
        servers.append(RealServer(str(directory / "s"), *arguments))
        return servers[-1]

    yield begin
    for server in servers:
        if server.process.poll() is None:
            assert server.close() == 0
