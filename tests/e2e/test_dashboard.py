"""Every query of the Grafana dashboard names metrics that a server has, as what they are."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import rollpack
from engine_process import ROOT, write_config
from scrape import PREFIX, Metrics, port_of, scrape_until

_NAME = re.compile(PREFIX + r"(\w+)(?:\{([^}]*)\})?(\[)?")
_LABEL = re.compile(r"(\w+)\s*(?:=|=~|!=|!~)\s*\"")
_BY = re.compile(r"\bby \((\w+)\)")
_LEGEND = re.compile(r"\{\{(\w+)\}\}")


def _queries() -> Iterator[tuple[str, str, str]]:
    """Where a query stands, its text, and the legend of its lines."""
    dashboard = json.loads((ROOT / "configs" / "grafana_dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"], target["legendFormat"]
    for annotation in dashboard["annotations"]["list"]:
        yield annotation["name"], annotation["expr"], ""
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"], ""


@pytest.fixture(scope="module")
def served(tiny_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    """What a server says once a trainer has reported."""
    config = write_config(
        tmp_path_factory.mktemp("dashboard") / "config.yaml",
        {"model": {"path": tiny_model}, "engine": {"kv_cache_memory": "16MiB", "num_threads": 1},
         "bridge": {"slots": 1, "slot_bytes": "1MiB"}, "metrics": {"port": 0}})
    with rollpack.launch(config) as client:
        client.report_probs_diff(rollpack.metrics.rollout_probs_diff([-1.0], [-1.0], [1]))
        return scrape_until(port_of(client), lambda m: m["probs_diff_reports_total"] == 1)


def _labels_of(metrics: Metrics, name: str) -> set[str]:
    # A scraper adds `instance` to all it takes.
    return {"instance"} | {label for (known, labels) in metrics.values if known == name
                           for label, _ in labels}


def _kind_of(metrics: Metrics, name: str) -> str:
    histogram = re.sub(r"_(bucket|sum|count)$", "", name)
    return "counter" if metrics.types.get(histogram) == "histogram" else metrics.types[name]


@pytest.mark.parametrize(("title", "query", "legend"), [
    pytest.param(*found, id=f"{found[0]}-{index}") for index, found in enumerate(_queries())])
def test_a_query_names_what_is_there(title: str, query: str, legend: str,
                                     served: Metrics) -> None:
    found = list(_NAME.finditer(query))
    assert found, f"{title}: {query} names no metric of ours"
    labels: set[str] = set()
    for match in found:
        name, matchers, has_range = match[1], match[2] or "", match[3] is not None
        assert name in served.names, f"{title}: {name} does not exist"
        used = set(_LABEL.findall(matchers))
        assert used <= _labels_of(served, name), f"{title}: {name} has no {used}"
        labels |= _labels_of(served, name)
        if has_range and "changes(" not in query:
            assert _kind_of(served, name) == "counter", f"{title}: the rate of {name}, a gauge"
    assert set(_BY.findall(query)) | set(_LEGEND.findall(legend)) <= labels
    assert query.count("(") == query.count(")") and query.count("{") == query.count("}")


def test_what_matters_is_on_the_dashboard() -> None:
    shown: set[str] = set()
    for _, query, _ in _queries():
        shown |= {match[1] for match in _NAME.finditer(query)}
    assert shown >= {
        "generation_tokens_total", "num_requests_running", "num_requests_waiting",
        "num_requests_preempted", "kv_cache_usage_perc", "prefix_cache_hits_total",
        "batch_padding_avoided_tokens_total", "batch_wait_seconds_bucket", "slots_used",
        "weight_version", "batch_version_lag", "worker_deaths_total", "retries_total",
        "rollout_probs_diff_mean"}


def test_panels_do_not_overlap() -> None:
    dashboard: dict[str, Any] = json.loads(
        (ROOT / "configs" / "grafana_dashboard.json").read_text())
    taken: dict[tuple[int, int], str] = {}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
