"""Hosts on one machine: network namespaces on a switch, and mpirun across them."""

from __future__ import annotations

import itertools
import os
import pathlib
import shlex
import shutil
import subprocess

_NETWORK = "10.89.7"
_SWITCH, _CABLE = "switch0", "cable0"
_numbers = itertools.count()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


def why_impossible() -> str:
    """Returns why no hosts can be made here, or ""."""
    for program in ("ip", "unshare", "mpirun"):
        if shutil.which(program) is None:
            return f"there is no program {program}"
    name = f"rollpack-probe-{os.getpid()}"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if probe.returncode != 0:
        return f"ip netns add: {probe.stderr.strip()}"
    try:
        for command in (["ip", "netns", "exec", name, "unshare", "--uts", "true"],
                        ["ip", "-n", name, "link", "add", _SWITCH, "type", "bridge"]):
            tried = subprocess.run(command, capture_output=True, text=True)
            if tried.returncode != 0:
                return f"{shlex.join(command)}: {tried.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return ""


class Hosts:
    """Hosts with two slots each; mpirun and rank 0 run on the first, which is also the switch."""

    def __init__(self, folder: pathlib.Path, num_hosts: int = 2) -> None:
        """Makes them. `folder` gets the scripts that mpirun needs."""
        number = f"{os.getpid()}n{next(_numbers)}"
        self.names = [f"rp{number}{letter}" for letter in "abcdefgh"[:num_hosts]]
        self._folder = folder
        agent = folder / "agent.sh"
        agent.write_text('#!/bin/sh\nhost=$1; shift\n'
                         'exec ip netns exec "$host" unshare --uts '
                         'sh -c "hostname $host; exec $*"\n')
        agent.chmod(0o755)
        (folder / "hosts").write_text("".join(f"{name} slots=2\n" for name in self.names))

    def __enter__(self) -> Hosts:
        first, *others = self.names
        for name in self.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", first, "link", "add", _SWITCH, "type", "bridge")
        _ip("-n", first, "addr", "add", f"{_NETWORK}.1/24", "dev", _SWITCH)
        _ip("-n", first, "link", "set", _SWITCH, "up")
        for index, name in enumerate(others, start=2):
            _ip("link", "add", _CABLE, "netns", name, "type", "veth",
                "peer", "name", f"port{index}", "netns", first)
            _ip("-n", first, "link", "set", f"port{index}", "master", _SWITCH, "up")
            _ip("-n", name, "addr", "add", f"{_NETWORK}.{index}/24", "dev", _CABLE)
            _ip("-n", name, "link", "set", _CABLE, "up")
        return self

    def __exit__(self, *error: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def launcher(self, num_ranks: int, map_by: str = "slot") -> list[str]:
        """Returns what stands before the program: mpirun on the first host, over all."""
        mpirun = ["mpirun", "--enable-recovery", "--bind-to", "none", "-n", str(num_ranks),
                  "--map-by", map_by, "--hostfile", str(self._folder / "hosts"),
                  "--mca", "plm_rsh_agent", str(self._folder / "agent.sh"),
                  "--mca", "oob_tcp_if_include", f"{_NETWORK}.0/24",
                  "--mca", "btl_tcp_if_include", f"{_NETWORK}.0/24"]
        host = self.names[0]
        return ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c",
                f'hostname {host}; exec {shlex.join(mpirun)} "$@"', "sh"]

    def cut(self) -> None:
        """The second host loses its link, without a word to anyone."""
        _ip("-n", self.names[1], "link", "set", _CABLE, "down")

    def mend(self) -> None:
        """The link is there again."""
        _ip("-n", self.names[1], "link", "set", _CABLE, "up")

    def slow_down(self, bytes_per_s: int) -> None:
        """Lets the first host send no faster.

        Raises: subprocess.CalledProcessError where the kernel has no such queue.
        """
        subprocess.run(["ip", "netns", "exec", self.names[0], "tc", "qdisc", "add", "dev",
                        _SWITCH, "root", "tbf", "rate", f"{8 * bytes_per_s}bit",
                        "burst", "64kb", "latency", "2s"], check=True, capture_output=True)

    def num_bytes_sent(self) -> int:
        """Returns what the first host has sent so far; what others send each other is not in it."""
        path = f"/sys/class/net/{_SWITCH}/statistics/tx_bytes"
        read = subprocess.run(["ip", "netns", "exec", self.names[0], "cat", path], check=True,
                              capture_output=True, text=True)
        return int(read.stdout)

    def is_on_another(self, pid: int) -> bool:
        """Whether a process runs on another host than the first."""
        return any(str(pid) in subprocess.run(["ip", "netns", "pids", name], check=True,
                                              capture_output=True, text=True).stdout.split()
                   for name in self.names[1:])
