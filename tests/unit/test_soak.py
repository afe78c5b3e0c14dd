"""What the soak calls growth, and its plot; a small soak itself over the in-memory transport's processes."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET

import pytest

from kvbaton.errors import ConfigError
from lab.soak.config import SoakConfig
from lab.soak.judge import complaints, slopes
from lab.soak.plot import ROWS, svg
from lab.soak.run import Half, Sample, run_soak

CONFIG = SoakConfig(rooms=40_000, sample_rooms=500)


def half(*, leak_kib: float = 0.0, fds: float = 0.0, noise_kib: float = 300.0) -> Half:
    """A made-up half whose memory fills up, then grows by ``leak_kib`` for each 1,000 rooms."""
    rng = random.Random(3)
    made = Half(survivor="source", seconds=60.0, restarts=2)
    for rooms in range(500, 20_001, 500):
        held = 80_000 + min(rooms, 8_000) + leak_kib * rooms / 1000 + rng.gauss(0, noise_kib)
        sizes = {"rss_kib": int(held), "threads": 6, "fds": 36 + int(fds * rooms / 1000), "transport_regions": 1}
        made.samples.append(Sample(rooms, rooms / 300, int(rooms > 9_000), sizes))
    return made


def test_what_fills_up_and_stays_is_flat() -> None:
    assert complaints(CONFIG, [half()]) == []
    assert all(slope.ok for slope in slopes(CONFIG, [half()]))


@pytest.mark.parametrize(("leak", "name"), [({"leak_kib": 400.0}, "rss_kib"), ({"fds": 0.3}, "fds")])
def test_a_leak_is_found_and_named(leak: dict[str, float], name: str) -> None:
    (complaint,) = complaints(CONFIG, [half(**leak)])
    assert complaint.startswith(f"{name} of the source grew by")


def test_what_is_left_and_what_is_wrong_is_told() -> None:
    made = half()
    made.left = {"rooms": 2, "leased_at_close": 1}
    made.outcomes["corrupt"] = 1
    assert len(complaints(CONFIG, [made])) == 2


def test_the_plot_is_xml_with_a_panel_for_each_quantity() -> None:
    root = ET.fromstring(svg(CONFIG, [half(), half()]))
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 2 * len(ROWS)
    assert len(svg(CONFIG, [half(), half()])) < 100_000


def test_settings_that_measure_nothing_are_refused() -> None:
    for wrong in ({"rooms": 10}, {"aborts": 2.0}, {"restart_seconds": 0.0}, {"concurrency": 0}):
        with pytest.raises(ConfigError):
            SoakConfig(**wrong)


def test_a_small_soak_ends_with_empty_tables_and_right_bytes() -> None:
    config = SoakConfig(rooms=400, sample_rooms=100, restart_seconds=0.2, concurrency=8)
    halves = run_soak(config, lambda _survivor, _rooms: None)
    for found in halves:
        assert found.outcomes.total() == 200
        assert found.outcomes["corrupt"] == found.peer_outcomes["corrupt"] == 0
        assert found.outcomes["success"] > 50
        assert found.restarts > 0
        assert not any(found.left.values()), found.left
