"""The C++ server in a process of its own, over the fake service that fake_service.h describes.

What that service samples follows from the prompt by a formula, repeated here, so that every byte a
client gets can be checked.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
VOCAB = 64
RESPONSE_LENGTH = 8
# What a weight update of the fake service must bring.
TENSOR_SHAPES = {
    "model.embed_tokens.weight": (8, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (8, 4),
}


def server_binary() -> Path:
    """The program `fake_rollout_service` of the build that ROLLPACK_BUILD_DIR names."""
    build = Path(os.environ.get("ROLLPACK_BUILD_DIR", _ROOT / "build"))
    for folder in (build / "tests" / "trainer_bridge", build / "tests"):
        if (folder / "fake_rollout_service").is_file():
            return folder / "fake_rollout_service"
    raise FileNotFoundError(
        f"fake_rollout_service is not in {build}: build it (tests/build.sh release), or set "
        "ROLLPACK_BUILD_DIR"
    )


def response(prompt: list[int], sample_index: int, length: int = RESPONSE_LENGTH) -> list[int]:
    """What the service answers, as fake_response() in fake_service.cc."""
    return [(sum(prompt) + sample_index + i) % VOCAB for i in range(length)]


def logprobs(length: int = RESPONSE_LENGTH) -> list[float]:
    """The logprobs of a response: -0.5 - i / 64, exact in f32."""
    return [-0.5 - i / 64 for i in range(length)]


class RealServer:
    """One running server; `path` is its socket."""

    def __init__(self, path: str, *arguments: str) -> None:
        """Start it and wait until it is ready."""
        self.path = path
        self.process = subprocess.Popen(
            [server_binary(), "--socket", path, *arguments], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line == "ready", f"the server said {line!r} and ended with {self.process.wait(10)}"

    def kill(self) -> None:
        """End it without warning."""
        self.process.kill()
        self.process.wait(10)

    def close(self) -> int:
        """End it with SIGTERM; returns the exit status."""
        self.process.terminate()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()


# Starts a server on a socket of its own, with these arguments.
Start = Callable[..., RealServer]
