"""The catalogue of faults."""

from __future__ import annotations

from tests.chaos.faults import drift, processes, registry, uplinks

CATALOGUE = {fault.name: fault for group in (registry, processes, uplinks, drift) for fault in group.FAULTS}
