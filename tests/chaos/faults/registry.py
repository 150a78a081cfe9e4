"""etcd: members die, freeze or are cut off, history is compacted, records are deleted or made up."""

from __future__ import annotations

import json
import random
import signal
from typing import TYPE_CHECKING

from tests.chaos.fault import SOON_AFTER, Fault, Impossible
from tests.chaos.registry_checks import OURS

if TYPE_CHECKING:
    from tests.chaos.fault import Heal, Inject
    from tests.chaos.schedule import Step
    from tests.chaos.world import World

ALL = ("registry:*",)
FAILED_OVER = 5.0
"""Seconds after which another member is asked, and another one leads."""
FOUND_OUT_AFTER = 20.0
"""Seconds in which it is certainly noticed that nobody answers."""
STRANGER, STRANGER6 = "192.0.2.250", "2001:db8::fa"
"""Addresses that no host has."""
GARBAGE = (
    "{",
    "",
    "null",
    '{"PublicIP":"192.0.2.300","BackendType":"vxlan"}',
    '{"PublicIP":"0.0.0.0","BackendType":"host-gw"}',
    '["PublicIP"]',
    '{"PublicIP":"198.51.100.250","BackendType":"quic","NodeID":"0"}',
)
"""Values that no daemon can use; with subnets that none of the hosts leases."""


def kill_members(world: World, step: Step) -> Heal:
    for name in step.targets:
        world.etcd.member(name).kill()
    return lambda: world.etcd.start(step.targets)


def freeze_members(world: World, step: Step) -> Heal:
    names = step.targets or ("0", "1", "2")
    for name in names:
        world.etcd.signal(name, signal.SIGSTOP)

    def heal() -> None:
        for name in names:
            world.etcd.signal(name, signal.SIGCONT)

    return heal


def cut_member(world: World, step: Step) -> Heal:
    member = world.etcd.member(step.targets[0])
    world.etcd.unusable.add(member)
    member.cut()

    def heal() -> None:
        member.mend()
        world.etcd.unusable.discard(member)

    return heal


def kill_leader(world: World, _step: Step) -> Heal:
    name = world.etcd.leader()
    world.etcd.member(name).kill()
    return lambda: world.etcd.start([name])


def cut_host_from_etcd(world: World, step: Step) -> Heal:
    host = world.host(step.targets[0])
    return world.drop(
        [
            rule
            for member in world.etcd.members
            for rule in (
                f"ip saddr {host.address} ip daddr {member.address}",
                f"ip saddr {member.address} ip daddr {host.address}",
            )
        ]
    )


def compact(world: World, _step: Step) -> None:
    """Up to where the history has been read: what is not known of it could not be checked."""
    revision = world.etcd.history.revision
    if revision < 2:
        raise Impossible("nothing has happened yet")
    world.etcd.ctl("compact", str(revision))


def delete_key(world: World, step: Step) -> None:
    world.etcd.ctl("del", world.etcd.own_path(world.host(step.targets[0])))


def delete_all_keys(world: World, _step: Step) -> None:
    world.etcd.ctl("del", "--prefix", f"{world.etcd.prefix}/subnets/")


def revoke_lease(world: World, step: Step) -> None:
    lease = world.etcd.own_lease(world.host(step.targets[0]))
    world.etcd.ctl("lease", "revoke", lease)


def put_garbage(world: World, step: Step) -> Heal:
    dice = random.Random(step.pick)
    key = f"{world.etcd.prefix}/subnets/10.5.{dice.randrange(240, 256)}.0-24"
    world.etcd.ctl("put", key, "--", dice.choice(GARBAGE))
    return lambda: world.etcd.ctl("del", key)


def put_garbage_as_config(world: World, step: Step) -> Heal:
    key = f"{world.etcd.prefix}/config"
    world.etcd.ctl("put", key, "--", random.Random(step.pick).choice(GARBAGE[:4]))
    return lambda: world.etcd.ctl("put", key, "--", world.config_text)


def delete_config(world: World, _step: Step) -> Heal:
    key = f"{world.etcd.prefix}/config"
    world.etcd.ctl("del", key)
    return lambda: world.etcd.ctl("put", key, "--", world.config_text)


def take_key(world: World, step: Step) -> Heal:
    """Somebody writes over a host's record, as an operator or an older flannel might."""
    host = world.host(step.targets[0])
    path = world.etcd.own_path(host)
    record = world.etcd.own_record(host) | {"PublicIP": STRANGER, "NodeID": OURS}
    if record["PublicIPv6"]:
        record["PublicIPv6"] = STRANGER6
    text = json.dumps(record)
    world.etcd.ctl("put", path, "--", text)
    return lambda: world.etcd.ctl("del", path)


def fill_up(world: World, _step: Step) -> Heal:
    world.etcd.fill()
    return world.etcd.make_room


def move_leader(world: World, step: Step) -> None:
    world.etcd.move_leader(step.pick)


def defragment(world: World, _step: Step) -> None:
    world.etcd.ctl("defrag")


def _of_a_member(name: str, inject: Inject, seconds: tuple[float, float], for_at_most: float) -> Fault:
    return Fault(
        name,
        inject,
        "member",
        seconds,
        ("member:{}",),
        disables=ALL,
        disables_for=for_at_most,
        weight=2,
    )


FAULTS = (
    Fault(
        "key taken",
        take_key,
        "host",
        (1, 8),
        # A daemon that starts meanwhile leases another subnet, as the conflict's text says.
        ("key:{}", "daemon:{}"),
        breaks="{}",
        needs=("daemon:*", "registry:*"),
        weight=0.7,
    ),
    Fault(
        "no space left",
        fill_up,
        "",
        (3, 15),
        ("member:0", "member:1", "member:2", "leader"),
        disables=ALL,
        weight=0.7,
    ),
    Fault("leader moved", move_leader, disables=ALL),
    Fault("etcd defragmented", defragment, disables=ALL, weight=0.5),
    _of_a_member("member killed", kill_members, (2, 12), FAILED_OVER),
    _of_a_member("member frozen", freeze_members, (2, 25), FOUND_OUT_AFTER),
    _of_a_member("member cut off", cut_member, (2, 25), FOUND_OUT_AFTER),
    Fault(
        "leader killed",
        kill_leader,
        "",
        (2, 10),
        ("leader",),
        disables=ALL,
        disables_for=FAILED_OVER,
        weight=2,
    ),
    Fault(
        "quorum lost",
        kill_members,
        "majority",
        (3, 25),
        ("member:{}", "leader"),
        disables=ALL,
        told_after=FOUND_OUT_AFTER,
    ),
    Fault(
        "etcd frozen",
        freeze_members,
        "",
        (3, 25),
        ("member:0", "member:1", "member:2", "leader"),
        disables=ALL,
        told_after=FOUND_OUT_AFTER,
    ),
    Fault(
        "host cut off from etcd",
        cut_host_from_etcd,
        "host",
        (3, 25),
        ("etcd-path:{}",),
        disables=("registry:{}",),
        told_after=FOUND_OUT_AFTER,
    ),
    Fault("history compacted", compact),
    Fault(
        "key deleted",
        delete_key,
        "host",
        holds=("key:{}",),
        breaks="{}",
        latent=True,
        needs=("daemon:{}", "registry:{}"),
        weight=1.5,
    ),
    Fault(
        "all keys deleted",
        delete_all_keys,
        breaks="*",
        latent=True,
        needs=("daemon:*", "registry:*"),
        weight=0.5,
    ),
    Fault(
        "lease revoked",
        revoke_lease,
        "host",
        holds=("key:{}",),
        breaks="{}",
        latent=True,
        needs=("daemon:{}", "registry:{}"),
    ),
    Fault("garbage record", put_garbage, "", (1, 10), grace=SOON_AFTER),
    Fault("garbage config", put_garbage_as_config, "", (1, 10), ("config",), grace=SOON_AFTER),
    Fault("config deleted", delete_config, "", (1, 10), ("config",), grace=SOON_AFTER, weight=0.5),
)
