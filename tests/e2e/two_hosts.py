"""Two hosts on one machine: network namespaces with a cable between them, and mpirun across it."""

from __future__ import annotations

import itertools
import os
import pathlib
import shlex
import shutil
import subprocess

_ADDRESSES = ("10.89.7.1", "10.89.7.2")
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
        inside = subprocess.run(["ip", "netns", "exec", name, "unshare", "--uts", "true"],
                                capture_output=True, text=True)
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"unshare --uts: {inside.stderr.strip()}" if inside.returncode != 0 else ""


class TwoHosts:
    """Hosts `names[0]`, where mpirun and rank 0 run, and `names[1]`, both with two slots."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Makes them. `folder` gets the scripts that mpirun needs."""
        number = f"{os.getpid()}n{next(_numbers)}"
        self.names = (f"rp{number}a", f"rp{number}b")
        self._cables = (f"c{number}a", f"c{number}b")
        self._folder = folder
        agent = folder / "agent.sh"
        agent.write_text('#!/bin/sh\nhost=$1; shift\n'
                         'exec ip netns exec "$host" unshare --uts '
                         'sh -c "hostname $host; exec $*"\n')
        agent.chmod(0o755)
        (folder / "hosts").write_text("".join(f"{name} slots=2\n" for name in self.names))

    def __enter__(self) -> TwoHosts:
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", self._cables[0], "netns", self.names[0], "type", "veth",
            "peer", "name", self._cables[1], "netns", self.names[1])
        for name, cable, address in zip(self.names, self._cables, _ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", cable, "up")
        return self

    def __exit__(self, *error: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def launcher(self, num_ranks: int) -> list[str]:
        """Returns what stands before the program: mpirun on the first host, over both."""
        mpirun = ["mpirun", "--enable-recovery", "--bind-to", "none", "-n", str(num_ranks),
                  "--hostfile", str(self._folder / "hosts"),
                  "--mca", "plm_rsh_agent", str(self._folder / "agent.sh"),
                  "--mca", "oob_tcp_if_include", "10.89.7.0/24",
                  "--mca", "btl_tcp_if_include", "10.89.7.0/24"]
        host = self.names[0]
        return ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c",
                f'hostname {host}; exec {shlex.join(mpirun)} "$@"', "sh"]

    def cut(self) -> None:
        """The second host loses its link, without a word to anyone."""
        _ip("-n", self.names[1], "link", "set", self._cables[1], "down")

    def mend(self) -> None:
        """The link is there again."""
        _ip("-n", self.names[1], "link", "set", self._cables[1], "up")

    def slow_down(self, bytes_per_s: int) -> None:
        """Lets the first host send no faster.

        Raises: subprocess.CalledProcessError where the kernel has no such queue.
        """
        subprocess.run(["ip", "netns", "exec", self.names[0], "tc", "qdisc", "add", "dev",
                        self._cables[0], "root", "tbf", "rate", f"{8 * bytes_per_s}bit",
                        "burst", "64kb", "latency", "2s"], check=True, capture_output=True)

    def num_bytes_received(self) -> int:
        """Returns what has come over the second host's link so far."""
        path = f"/sys/class/net/{self._cables[1]}/statistics/rx_bytes"
        read = subprocess.run(["ip", "netns", "exec", self.names[1], "cat", path], check=True,
                              capture_output=True, text=True)
        return int(read.stdout)

    def is_on_second(self, pid: int) -> bool:
        """Whether a process runs on the second host."""
        listed = subprocess.run(["ip", "netns", "pids", self.names[1]], check=True,
                                capture_output=True, text=True)
        return str(pid) in listed.stdout.split()
