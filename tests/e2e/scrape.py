"""Reads the metrics and the health of a running server, as Prometheus and a probe do."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable
from typing import Any

import rollpack

PREFIX = "rollpack:"
_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(\{.*\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """One scrape. Numbers are found by name, without the prefix, and labels."""

    def __init__(self, text: str) -> None:
        """Parses Prometheus' text format 0.0.4; what breaks its rules is an AssertionError."""
        self.types: dict[str, str] = {}
        self.values: dict[tuple[str, Labels], float] = {}
        helped: set[str] = set()
        for line in text.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                assert name not in helped, f"{name} comes twice"
                assert line.split(" ", 3)[3], f"{name} is not explained"
                helped.add(name)
            elif line.startswith("# TYPE "):
                name, kind = line.split(" ")[2:]
                assert name in helped and name.startswith(PREFIX)
                self.types[name.removeprefix(PREFIX)] = kind
            elif line:
                match = _SAMPLE.fullmatch(line)
                assert match, line
                key = (match[1].removeprefix(PREFIX), tuple(_LABEL.findall(match[2] or "")))
                assert key not in self.values, f"{line} comes twice"
                self.values[key] = float(match[3])
        assert text.endswith("\n")

    def __getitem__(self, name: str) -> float:
        """The number of a metric without labels."""
        return self.values[name, ()]

    def labelled(self, name: str, label: str) -> dict[str, float]:
        """The numbers of a metric by one label."""
        return {dict(labels)[label]: value for (known, labels), value in self.values.items()
                if known == name}

    @property
    def names(self) -> set[str]:
        """All metrics, as a query may name them: of histograms with their suffixes."""
        return {name for name, _ in self.values}


def get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    """Asks once. Returns: status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def scrape(port: int) -> Metrics:
    """Returns: the metrics of now."""
    status, body = get(port, "/metrics")
    assert status == 200, body
    return Metrics(body)


def health(port: int) -> tuple[int, dict[str, Any]]:
    """Returns: the status and what /health says."""
    status, body = get(port, "/health")
    return status, json.loads(body)


def scrape_until(port: int, holds: Callable[[Metrics], bool], timeout_s: float = 15.0) -> Metrics:
    """Scrapes until something holds: ranks say their numbers once a second.

    Raises: AssertionError with the last scrape when time is up.
    """
    deadline = time.monotonic() + timeout_s
    while not holds(metrics := scrape(port)):
        assert time.monotonic() < deadline, sorted(metrics.values.items())
        time.sleep(0.1)
    return metrics


def port_of(client: rollpack.Client) -> int:
    """Returns: where a server's metrics are, as it tells its clients."""
    return int(client.stats()["metrics_port"])
