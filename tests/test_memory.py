"""What the process holds on to, as the system sees it."""

import asyncio
from pathlib import Path

from tests.bench.load import machine
from tests.soak import servers
from tests.soak.clients import Load
from tests.soak.memory import MIB


async def test_large_buffers_go_back_to_the_system(tmp_path: Path):
    simulator = servers.simulator(tmp_path, "simulator")
    config = tmp_path / "proxy.yaml"
    proxy = servers.proxy(tmp_path, config)
    try:
        await simulator.start()
        servers.write_config(config, [simulator.url])
        await proxy.start()
        before = machine.rss_bytes(proxy.pid)
        # Clients that read nothing of large events for a while, and others besides.
        load = Load(proxy.url, 1, habits=("stalls", "converses"), faulty=0.5)
        await load.run(40, 4)
        await asyncio.sleep(0.5)
        after = machine.rss_bytes(proxy.pid)
    finally:
        await proxy.stop()
        await simulator.stop()
    assert load.violations == []
    print("GREW", (after - before) / MIB)
    assert after - before < 15 * MIB
