"""Daemons and their helpers: killed, frozen, restarted, one or all; hosts that join and leave."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from tests.chaos.fault import SOON_AFTER, Fault, Impossible
from tests.chaos.faults.drift import flush_routes
from tests.chaos.schedule import HOSTS

if TYPE_CHECKING:
    from tests.chaos.fault import Heal
    from tests.chaos.schedule import Step
    from tests.chaos.world import World


def kill_daemon(world: World, step: Step) -> Heal:
    name = step.targets[0]
    world.kill_daemon(name)
    return lambda: world.start_daemon(name)


def freeze_daemon(world: World, step: Step) -> Heal:
    daemon = world.host(step.targets[0]).daemon
    if not daemon.running:
        raise Impossible("it does not run")
    daemon.send_signal(signal.SIGSTOP)
    return lambda: daemon.send_signal(signal.SIGCONT)


def restart_daemon(world: World, step: Step) -> None:
    world.stop_daemon(step.targets[0])
    world.start_daemon(step.targets[0])


def restart_all(world: World, _step: Step) -> None:
    for name in world.names:
        world.kill_daemon(name)
    for name in world.names:
        world.start_daemon(name)


def kill_all(world: World, _step: Step) -> Heal:
    names = list(world.names)
    for name in names:
        world.kill_daemon(name)

    def heal() -> None:
        for name in names:
            if name in world.names and not world.host(name).daemon.running:  # who had joined may have left
                world.start_daemon(name)

    return heal


def kill_worker(world: World, step: Step) -> None:
    world.signal_worker(step.targets[0], signal.SIGKILL)


def freeze_worker(world: World, step: Step) -> None:
    """Nobody thaws it: the daemon has to replace it."""
    world.signal_worker(step.targets[0], signal.SIGSTOP)


def join(world: World, step: Step) -> Heal | None:
    name = f"new{step.number}"
    world.join(name)
    if step.pick % 2:
        return None  # it stays
    return lambda: world.leave(name)


def clone(world: World, step: Step) -> Heal:
    """A host joins that was made from the image of another one, node id and all."""
    name = f"new{step.number}"
    world.join(name, node_id=world.host(step.targets[0]).node_id)
    return lambda: world.leave(name, its_record=False)


def join_with_address(world: World, step: Step) -> Heal:
    """A host joins that publishes the address of another one, as behind a NAT."""
    name = f"new{step.number}"
    world.join(name, f"--public-ip={world.host(step.targets[0]).address}")
    return lambda: world.leave(name, its_record=False)


def start_second(world: World, step: Step) -> Heal:
    """A second daemon on the same host, which must refuse."""
    name = step.targets[0]
    if not world.host(name).daemon.running:
        raise Impossible("there is no first one")
    second = world.start_second(name)
    return lambda: world.note_second(name, second)


def die_at_a_write(world: World, step: Step) -> Heal:
    """The daemon is killed right after one of its writes to the kernel or to files."""
    name = step.targets[0]
    world.kill_daemon(name)
    flush_routes(world, step)
    world.start_dying(name, step.pick % 6)

    def heal() -> None:
        world.kill_daemon(name)
        world.start_daemon(name)

    return heal


def reboot(world: World, step: Step) -> None:
    """With or without etcd: devices, routes, rules and /run are gone, the state directory is there."""
    world.reboot(step.targets[0])


def corrupt_state(world: World, step: Step) -> Heal:
    """While no daemon holds it: cut off, overwritten, or another's."""
    name = step.targets[0]
    world.kill_daemon(name)
    dice = random.Random(step.pick)
    files = [world.host(name).state_directory / kept for kept in ("state.json", "registry")]
    for file in filter(Path.exists, files):
        content = file.read_bytes()
        file.write_bytes(
            dice.choice(
                [
                    content[: len(content) // 2],
                    b"",
                    dice.randbytes(200),
                    json.dumps({"version": 99}).encode(),
                    content.replace(b"10.5.", b"10.6."),
                ]
            )
        )
    return lambda: world.start_daemon(name)


def turn_clock(world: World, step: Step) -> Heal:
    """As by hand, by a clock without battery, or by a server of time that lies."""
    clock = world.clock(step.targets[0])
    clock.turn(random.Random(step.pick).choice(CLOCK_JUMPS))
    return lambda: clock.turn(0)


def spoil_subnet_file(world: World, step: Step) -> None:
    file = world.host(step.targets[0]).subnet_file
    dice = random.Random(step.pick)
    world.spoil(step.targets[0])
    if dice.random() < 0.5:
        file.unlink(missing_ok=True)
    else:
        file.write_text("FLANNEL_NETWORK=10.9.0.0/16\nFLANNEL_SUBNET=10.9.1.1/24\n")


HOUR, YEAR = 3_600, 31_536_000
CLOCK_JUMPS = (-YEAR, -HOUR, HOUR, YEAR)
DAEMON = ("daemon:{}",)
ALL_DAEMONS = tuple(f"daemon:{name}" for name in HOSTS)
WHOLE_HOST = (*DAEMON, "key:{}", "uplink:{}", "etcd-path:{}")
"""Whom it is taken for must be seen to live."""
ALL_NEEDED = ("daemon:*", "registry:*")
FAULTS = (
    Fault("daemon killed", kill_daemon, "host", (0, 12), DAEMON, disables=DAEMON, udp_breaks="{}", weight=3),
    Fault("daemon frozen", freeze_daemon, "host", (1, 25), DAEMON, disables=DAEMON, weight=2),
    Fault(
        "daemon restarted", restart_daemon, "host", holds=DAEMON, disables=DAEMON, udp_breaks="{}", weight=2
    ),
    Fault("all daemons restarted", restart_all, holds=ALL_DAEMONS, disables=("daemon:*",), udp_breaks="*"),
    Fault("all daemons killed", kill_all, "", (1, 10), ALL_DAEMONS, disables=("daemon:*",), udp_breaks="*"),
    Fault(
        "worker killed", kill_worker, "host", needs=DAEMON, breaks="{}", grace=SOON_AFTER, backends=("udp",)
    ),
    Fault("worker frozen", freeze_worker, "host", needs=DAEMON, breaks="{}", backends=("udp",)),
    Fault(
        "daemon dies at a write",
        die_at_a_write,
        "host",
        (4, 10),
        DAEMON,
        breaks="{}",
        needs=DAEMON,
        disables=DAEMON,
        stirs="{}",
    ),
    Fault("host rebooted", reboot, "host", holds=WHOLE_HOST, breaks="{}", needs=DAEMON, stirs="{}"),
    Fault("clone joins", clone, "host", (6, 15), WHOLE_HOST, needs=ALL_NEEDED, weight=0.7),
    Fault(
        "host joins with a taken address",
        join_with_address,
        "host",
        (6, 15),
        WHOLE_HOST,
        needs=ALL_NEEDED,
        backends=("vxlan", "vxlan-direct"),
        weight=0.7,
    ),
    Fault("second daemon started", start_second, "host", (8, 12), DAEMON, weight=0.7),
    Fault("host joins", join, "", (5, 15), needs=ALL_NEEDED),
    Fault(
        "state files corrupted",
        corrupt_state,
        "host",
        (0, 3),
        DAEMON,
        disables=DAEMON,
        udp_breaks="{}",
    ),
    Fault("clock turned", turn_clock, "host", (2, 20), ("clock:{}",)),
    Fault("subnet.env spoiled", spoil_subnet_file, "host", needs=DAEMON),
)
