"""The page for Prometheus, read by Prometheus's own parser."""

from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from tests.support.client import request


class Page:
    """The samples of one page."""

    def __init__(self, text: str) -> None:
        self.samples = [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name that have those labels."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == f"completions_proxy_{name}"
            and labels.items() <= sample.labels.items()
        )


async def scrape(url: str, headers: Mapping[str, str] | None = None) -> Page:
    raw = await request(url, "GET", "/-/metrics", headers or {})
    assert raw.status == 200, raw.text
    assert (raw.header("content-type") or "").startswith("text/plain; version=")
    return Page(raw.text)
