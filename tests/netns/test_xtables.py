"""What is read of legacy iptables, against what its own tools write and show."""

from __future__ import annotations

import time
from ipaddress import ip_network
from typing import TYPE_CHECKING

import pytest

from flanneld_py.drivers.xtables import LegacyTables
from flanneld_py.errors import KernelError
from flanneld_py.packetfilter import Chain, ChainKey, Mark, Match, Rule, Verdict
from tests.netns.inside import Namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


TOOLS = {"ip": "iptables-legacy", "ip6": "ip6tables-legacy"}


@pytest.fixture
def net() -> Iterator[Namespace]:
    with Namespace() as namespace:
        yield namespace


@pytest.fixture
def tables(net: Namespace) -> LegacyTables:
    return net.agent().make(LegacyTables)


def load(net: Namespace, family: str, text: str) -> None:
    """What `iptables-legacy-restore` takes."""
    net.run(f"{TOOLS[family]}-restore", text=text)


def written(rule: Rule) -> str:
    """A rule as `iptables -S` shows it; for what these tests use of each field."""
    words = [
        f"{'! ' if match.negated else ''}{condition(match)}"
        if match.field in SHORT
        else condition(match).replace(" --", " ! --" if match.negated else " --")
        for match in rule.matches
    ]
    if rule.comment:
        words.append(f'-m comment --comment "{rule.comment}"')
    verdict = rule.verdict
    if verdict.kind == "masquerade":
        words.append("-j MASQUERADE" + (" --random-fully" if verdict.fully_random else ""))
    elif verdict.kind in ("jump", "goto"):
        words.append(f"-{verdict.kind[0]} {verdict.target}")
    elif verdict.kind != "none":
        words.append(f"-j {verdict.kind.upper()}")
    return " ".join(words)


SHORT = {"saddr": "-s", "daddr": "-d", "iifname": "-i", "oifname": "-o", "l4proto": "-p"}
PROTOCOLS = {"6": "tcp", "17": "udp", "58": "ipv6-icmp"}


def condition(match: Match) -> str:
    first = match.values[0]
    if match.field in SHORT:
        text = str(first)
        return f"{SHORT[match.field]} {PROTOCOLS.get(text, text.replace('*', '+'))}"
    if isinstance(first, Mark):
        return f"-m mark --mark {first.value:#x}/{first.mask:#x}"
    listed = ",".join(str(value).upper() for value in match.values)
    return f"-m conntrack --{match.field.replace(' ', '')} {listed}"


def shown(chains: dict[ChainKey, Chain], family: str, table: str) -> list[str]:
    """Chains as `iptables -S` shows them."""
    mine = {key.chain: chain for key, chain in chains.items() if (key.family, key.table) == (family, table)}
    heads = [
        f"-P {name} {chain.policy.upper()}" if chain.hook else f"-N {name}" for name, chain in mine.items()
    ]
    return [*heads, *(f"-A {name} {written(rule)}".rstrip() for name in mine for rule in mine[name].rules)]


IP_FILTER = """*filter
:INPUT ACCEPT
:FORWARD DROP
:OUTPUT ACCEPT
:DOCKER-USER -
:EMPTY -
:FLANNEL-FWD -
-A INPUT -i lo -j ACCEPT
-A INPUT ! -i eth+ -j RETURN
-A FORWARD -j DOCKER-USER
-A FORWARD -g FLANNEL-FWD
-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -m conntrack ! --ctstate NEW,INVALID,UNTRACKED -j DROP
-A FORWARD -m conntrack --ctstatus CONFIRMED,ASSURED -j ACCEPT
-A FORWARD -m state --state INVALID -j DROP
-A FORWARD -i cni0 ! -o flannel.1 -j QUEUE
-A DOCKER-USER -s 10.5.0.0/16 ! -d 10.5.3.0/24 -p tcp -j ACCEPT
-A DOCKER-USER ! -s 10.5.7.1 ! -p udp -j RETURN
-A DOCKER-USER -m mark --mark 0x4000/0x4000 -j EMPTY
-A DOCKER-USER -m mark ! --mark 0x0/0xff
-A DOCKER-USER
-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
"""
IP_NAT = """*nat
:PREROUTING ACCEPT
:INPUT ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
:FLANNEL-POSTRTG -
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -j MASQUERADE
COMMIT
"""
IP6_FILTER = """*filter
:INPUT DROP
:FORWARD ACCEPT
:OUTPUT ACCEPT
:FLANNEL-FWD -
-A FORWARD -j FLANNEL-FWD
-A FORWARD -i flannel-v6.1 -p ipv6-icmp -g FLANNEL-FWD
-A FLANNEL-FWD ! -s fd00:5::/32 -d fd00:5:3::/64 -j ACCEPT
COMMIT
"""
IP6_NAT = """*nat
:PREROUTING ACCEPT
:INPUT ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
-A POSTROUTING -s fd00:5::/32 ! -d ff00::/8 -j MASQUERADE --random-fully
-A POSTROUTING ! -s fd00:5::/32 -d fd00:5::/32 -j MASQUERADE
COMMIT
"""


@pytest.mark.parametrize(
    ("family", "table", "text"),
    [
        ("ip", "filter", IP_FILTER),
        ("ip", "nat", IP_NAT),
        ("ip6", "filter", IP6_FILTER),
        ("ip6", "nat", IP6_NAT),
    ],
)
def test_rules_are_read_as_iptables_shows_them(
    net: Namespace, tables: LegacyTables, family: str, table: str, text: str
) -> None:
    load(net, family, text)
    told = net.run(TOOLS[family], "-t", table, "-S").replace("-m state --state", "-m conntrack --ctstate")
    assert in_order(shown(tables.chains(), family, table)) == in_order(told.splitlines())


def in_order(lines: list[str]) -> list[str]:
    """Chain by chain, the rules of each as they are; a list of states in alphabetical order."""
    words = [[",".join(sorted(word.split(","))) for word in line.split(" ")] for line in lines]
    return [" ".join(line) for line in sorted(words, key=lambda line: line[:2])]


def one(tables: LegacyTables, chain: str, table: str = "filter") -> Chain:
    return tables.chains()[ChainKey("legacy", "ip", table, chain)]


def test_builtin_chains_have_hook_kind_priority_and_policy(net: Namespace, tables: LegacyTables) -> None:
    net.run("iptables-legacy", "-P", "FORWARD", "DROP")
    for table in ("nat", "mangle", "raw", "security"):
        net.run("iptables-legacy", "-t", table, "-S")
    found = {
        (key.table, key.chain): (chain.hook, chain.kind, chain.priority, chain.policy)
        for key, chain in tables.chains().items()
    }
    # linux/netfilter_ipv4.h enum nf_ip_hook_priorities
    assert found == {
        ("filter", "INPUT"): ("input", "filter", 0, "accept"),
        ("filter", "FORWARD"): ("forward", "filter", 0, "drop"),
        ("filter", "OUTPUT"): ("output", "filter", 0, "accept"),
        ("nat", "PREROUTING"): ("prerouting", "nat", -100, "accept"),
        ("nat", "INPUT"): ("input", "nat", 100, "accept"),
        ("nat", "OUTPUT"): ("output", "nat", -100, "accept"),
        ("nat", "POSTROUTING"): ("postrouting", "nat", 100, "accept"),
        ("mangle", "PREROUTING"): ("prerouting", "filter", -150, "accept"),
        ("mangle", "INPUT"): ("input", "filter", -150, "accept"),
        ("mangle", "FORWARD"): ("forward", "filter", -150, "accept"),
        ("mangle", "OUTPUT"): ("output", "filter", -150, "accept"),
        ("mangle", "POSTROUTING"): ("postrouting", "filter", -150, "accept"),
        ("raw", "PREROUTING"): ("prerouting", "filter", -300, "accept"),
        ("raw", "OUTPUT"): ("output", "filter", -300, "accept"),
        ("security", "INPUT"): ("input", "filter", 50, "accept"),
        ("security", "FORWARD"): ("forward", "filter", 50, "accept"),
        ("security", "OUTPUT"): ("output", "filter", 50, "accept"),
    }


@pytest.mark.parametrize(
    ("table", "chain", "written_as", "rule"),
    [
        ("nat", "PREROUTING", "-i eth0 -p tcp -m tcp --dport 80 -j DNAT --to 10.5.1.2", Verdict("nat")),
        ("nat", "POSTROUTING", "-o eth0 -j SNAT --to 192.0.2.1", Verdict("nat")),
        ("nat", "POSTROUTING", "-p udp -j MASQUERADE --to-ports 1024-2048", Verdict("nat")),
        ("nat", "PREROUTING", "-p tcp -j REDIRECT --to-ports 80", Verdict("nat")),
        ("filter", "FORWARD", "-j REJECT --reject-with icmp-admin-prohibited", Verdict("reject")),
        ("filter", "FORWARD", "-p tcp -j REJECT --reject-with tcp-reset", Verdict("reject")),
        ("filter", "FORWARD", "-j NFQUEUE --queue-num 3", Verdict("queue")),
        ("filter", "FORWARD", "-j LOG --log-prefix x", Verdict("none")),
        ("mangle", "FORWARD", "-p tcp --syn -j TCPMSS --clamp-mss-to-pmtu", Verdict("none")),
        ("mangle", "PREROUTING", "-p tcp -j TPROXY --on-port 80", Verdict("unknown")),
    ],
)
def test_targets(
    net: Namespace, tables: LegacyTables, table: str, chain: str, written_as: str, rule: Verdict
) -> None:
    net.run("iptables-legacy", "-t", table, "-A", chain, *written_as.split())
    assert [found.verdict for found in one(tables, chain, table).rules] == [rule]


@pytest.mark.parametrize(
    "written_as",
    [
        "-m multiport -p tcp --dports 80,443",
        "-m addrtype --dst-type LOCAL",
        "-m physdev --physdev-is-bridged",
        "-m limit --limit 3/s",
        "-p tcp --dport 80",
        "-m conntrack --ctorigdst 10.5.1.2 --ctstate NEW",
        "-m iprange --src-range 10.5.1.2-10.5.1.9",
        "-s 10.5.0.1/255.255.0.255",
        "-f",
    ],
)
def test_what_is_not_understood_is_a_condition_for_the_operator(
    net: Namespace, tables: LegacyTables, written_as: str
) -> None:
    net.run("iptables-legacy", "-A", "FORWARD", *written_as.split(), "-j", "ACCEPT")
    (rule,) = one(tables, "FORWARD").rules
    assert rule.verdict == Verdict("accept")
    others = [match for match in rule.matches if match.field == "other"]
    assert others
    assert all(isinstance(match.values[0], str) and match.values[0] for match in others)


def test_addresses_that_a_connection_was_given_are_a_status(net: Namespace, tables: LegacyTables) -> None:
    net.run("iptables-legacy", *["-A", "FORWARD", "-m", "conntrack", "--ctstate", "DNAT", "-j", "ACCEPT"])
    assert one(tables, "FORWARD").rules == (Rule((Match("ct status", ("dnat",)),), Verdict("accept")),)


def test_a_condition_that_never_holds_is_no_absent_one(net: Namespace, tables: LegacyTables) -> None:
    net.run("iptables-legacy", *["-A", "INPUT", "!", "-i", "+", "-j", "DROP"])
    assert one(tables, "INPUT").rules == (Rule((Match("iifname", ("*",), negated=True),), Verdict("drop")),)
    net.run("ping", "-c", "1", "127.0.0.1")


def test_a_rule_that_marks_is_known_to(net: Namespace, tables: LegacyTables) -> None:
    load(net, "ip", "*mangle\n-A FORWARD -s 10.5.0.0/16 -j MARK --set-mark 0x1\nCOMMIT\n")
    (rule,) = one(tables, "FORWARD", "mangle").rules
    assert rule.sets == {"mark"}
    assert rule.matches == (Match("saddr", (ip_network("10.5.0.0/16"),)),)


def test_the_longest_names_are_read_whole(net: Namespace, tables: LegacyTables) -> None:
    chain, device, comment = "C" * 28, "d" * 15, "w" * 255
    net.run("iptables-legacy", "-N", chain)
    net.run(
        "iptables-legacy", "-A", "FORWARD", "-i", device, "-m", "comment", "--comment", comment, "-j", chain
    )
    rule = Rule((Match("iifname", (device,)),), Verdict("jump", chain), comment)
    assert one(tables, "FORWARD").rules == (rule,)
    assert one(tables, chain) == Chain()


def test_counters_are_read_and_do_not_change_the_fingerprint(net: Namespace, tables: LegacyTables) -> None:
    load(net, "ip", IP_FILTER)
    load(net, "ip6", IP6_FILTER)
    before = tables.fingerprint()
    assert one(tables, "INPUT").rules[0].packets == 0
    net.run("ping", "-c", "2", "-i", "0.01", "127.0.0.1")
    assert one(tables, "INPUT").rules[0].packets == 4
    assert tables.fingerprint() == before


@pytest.mark.parametrize(
    "change",
    [
        "iptables-legacy -P FORWARD ACCEPT",
        "iptables-legacy -F DOCKER-USER",
        "iptables-legacy -A FORWARD -j DROP",
        "iptables-legacy -R INPUT 1 -i l1 -j ACCEPT",
        "iptables-legacy -E EMPTY empty",
        "iptables-legacy -t nat -N X",
        "ip6tables-legacy -P FORWARD DROP",
    ],
)
def test_a_change_of_rules_or_policies_changes_the_fingerprint(
    net: Namespace, tables: LegacyTables, change: str
) -> None:
    load(net, "ip", IP_FILTER)
    load(net, "ip6", IP6_FILTER)
    before = tables.fingerprint()
    net.run(*change.split())
    assert tables.fingerprint() != before


def test_looking_makes_no_table(net: Namespace, tables: LegacyTables) -> None:
    assert tables.chains() == {}
    tables.fingerprint()
    names = net.run("cat", "/proc/self/net/ip_tables_names", "/proc/self/net/ip6_tables_names")
    assert names == ""
    net.run("ip6tables-legacy", "-t", "raw", "-S")
    assert {key[:3] for key in tables.chains()} == {("legacy", "ip6", "raw")}


def test_rules_of_iptables_nft_are_not_legacy(net: Namespace, tables: LegacyTables) -> None:
    net.run("iptables-nft", *["-A", "FORWARD", "-s", "10.5.0.0/16", "-j", "ACCEPT"])
    assert tables.chains() == {}


def test_without_the_right_to_it_is_said_what_is_missing(net: Namespace) -> None:
    net.run("iptables-legacy", "-P", "FORWARD", "DROP")
    powerless = net.agent("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin")
    tables = powerless.make(LegacyTables)
    with pytest.raises(KernelError) as caught:
        tables.chains()
    assert str(caught.value) == (
        "cannot read the rules of legacy iptables: Operation not permitted; CAP_NET_ADMIN is needed"
    )
    with pytest.raises(KernelError, match="CAP_NET_ADMIN is needed"):
        tables.fingerprint()


def test_net_admin_is_enough(net: Namespace) -> None:
    net.run("iptables-legacy", "-P", "FORWARD", "DROP")
    tables = net.agent("setpriv", "--bounding-set", "-net_raw", "--inh-caps", "-net_raw").make(LegacyTables)
    assert one(tables, "FORWARD").policy == "drop"


def test_a_table_that_changes_all_the_time_is_read_whole(net: Namespace, tables: LegacyTables) -> None:
    add, clear = "iptables-legacy -w -A FORWARD -s 10.5.1.0 -j X", "iptables-legacy -w -F FORWARD"
    net.run("iptables-legacy", "-N", "X")
    with net.popen("sh", "-c", f"while :; do {add}; {clear}; done") as changing:
        seen = {len(one(tables, "FORWARD").rules) for _ in range(500)}
        changing.kill()
    assert seen <= {0, 1}
    assert one(tables, "INPUT").policy == "accept"


def test_ten_thousand_rules_cost_milliseconds(
    net: Namespace, tables: LegacyTables, figure: Callable[[str], None]
) -> None:
    lines = "".join(
        f"-A X -s 10.6.{n // 256}.{n % 256}/32 -m comment --comment r{n} -j RETURN\n" for n in range(10_000)
    )
    load(net, "ip", f"*filter\n:X -\n{lines}COMMIT\n")
    begun = time.monotonic()
    first = tables.fingerprint()
    looked = time.monotonic() - begun
    assert tables.fingerprint() == first
    assert len(one(tables, "X").rules) == 10_000
    figure(f"fingerprint of 10,000 legacy rules: {looked * 1000:.1f} ms")
    assert looked < 1
