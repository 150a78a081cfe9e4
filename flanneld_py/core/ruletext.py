"""Packet-filter rules in the words of their tools: scripts for `nft -f` and for `iptables-restore`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from flanneld_py.packetfilter import Chain, ChainKey, Field, Mark, Match, Rule, Verdict

ADDRESS_FLAGS: Mapping[Field, str] = {"saddr": "-s", "daddr": "-d"}


class Edit(NamedTuple):
    """A chain as it shall be, and what of ours is in it now."""

    key: ChainKey
    new: Chain
    """Without rules in a chain that we share, our rules go out of it."""
    old: Chain | None
    whole: bool
    """Whether all of the chain is ours."""
    gone: bool = False
    """Whether a chain that is wholly ours shall be no more."""
    referred: bool = False
    """Whether rules of others lead to it: then it cannot go, and is only emptied."""


def nft_script(edits: Sequence[Edit], anew: Collection[tuple[str, str]] = ()) -> str:
    """What makes these chains so, in one transaction.

    A chain of ours is emptied and filled, made anew only if it hangs elsewhere than it should.

    Args:
        edits: what shall be.
        anew: family and name of tables of ours that are deleted first, with all that is there.
    """
    lines = [f"{verb} table {family} {name}" for family, name in anew for verb in ("add", "delete")]
    for edit in (edit._replace(old=None) if edit.key[1:3] in anew else edit for edit in edits):
        lines += _nft_whole(edit) if edit.whole else _nft_shared(edit)
    return "\n".join((*lines, ""))


def _nft_whole(edit: Edit) -> Iterator[str]:
    key, new, old = edit.key, edit.new, edit.old
    table = f"{key.family} {key.table}"
    chain = f"{table} {key.chain}"
    yield f"add table {table}"
    if old is not None and (old.hook, old.kind, old.priority) != (new.hook, new.kind, new.priority):
        yield f"flush chain {chain}"
        yield f"delete chain {chain}"
    base = f" {{ type {new.kind} hook {new.hook} priority {new.priority}; policy {new.policy}; }}"
    yield f"add chain {chain}{base if new.hook else ''}"
    yield f"flush chain {chain}"
    for rule in new.rules:
        yield f"add rule {chain} {nft_rule(rule)}"


def _nft_shared(edit: Edit) -> Iterator[str]:
    """Ours come first, so that nothing else in that chain drops before they accept."""
    key = edit.key
    chain = f"{key.family} {key.table} {key.chain}"
    for rule in edit.old.rules if edit.old else ():
        yield f"delete rule {chain} handle {rule.handle}"
    for rule in reversed(edit.new.rules):
        yield f"insert rule {chain} {nft_rule(rule)}"


def nft_rule(rule: Rule) -> str:
    """`ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random comment "flanneld masq"`."""
    verdict = rule.verdict
    words = [_nft_match(match) for match in rule.matches]
    words.append(" ".join(word for word in (verdict.kind, verdict.target) if word))
    if verdict.fully_random:
        words.append("fully-random")
    if rule.comment:
        words.append(f'comment "{rule.comment}"')
    return " ".join(words)


def _nft_match(match: Match) -> str:
    (value,) = match.values
    if isinstance(value, Mark):
        return f"meta mark & {value.mask:#x} == {value.value:#x}"
    if match.field == "nfproto":
        return f"meta nfproto ipv{value}"
    family = "ip" if ":" not in str(value) else "ip6"
    return f"{family} {match.field} {'!= ' if match.negated else ''}{value}"


def iptables_script(table: str, edits: Sequence[Edit]) -> str:
    """What makes these chains of one table so; the tool must be told --noflush."""
    whole = [edit for edit in edits if edit.whole]
    shared = [edit for edit in edits if not edit.whole]
    lines = [f"*{table}"]
    # This makes a chain, or empties it.
    lines += [f":{edit.key.chain} - [0:0]" for edit in whole if not edit.gone]
    for edit in whole:
        lines += [f"-A {edit.key.chain} {iptables_rule(rule)}" for rule in edit.new.rules]
    for edit in shared:
        lines += _iptables_shared(edit)
    for edit in whole:
        if edit.gone:
            lines.append(f"-F {edit.key.chain}")
            if not edit.referred:
                lines.append(f"-X {edit.key.chain}")
    return "\n".join((*lines, "COMMIT", ""))


def _iptables_shared(edit: Edit) -> Iterator[str]:
    """A jump goes to the end, as flannel's does; what is to accept in somebody's chain, to its head."""
    chain = edit.key.chain
    for rule in edit.old.rules if edit.old else ():
        yield f"-D {chain} {iptables_rule(rule)}"
    for rule in reversed(edit.new.rules):
        if rule.verdict.kind != "jump":
            yield f"-I {chain} 1 {iptables_rule(rule)}"
    for rule in edit.new.rules:
        if rule.verdict.kind == "jump":
            yield f"-A {chain} {iptables_rule(rule)}"


def iptables_rule(rule: Rule) -> str:
    """`-s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully`."""
    words = [_iptables_match(match) for match in rule.matches]
    if rule.comment:
        words.append(f'-m comment --comment "{rule.comment}"')
    words.append(f"-j {_iptables_target(rule.verdict)}")
    return " ".join(words)


def _iptables_match(match: Match) -> str:
    (value,) = match.values
    if isinstance(value, Mark):
        return f"-m mark --mark {value.value:#x}/{value.mask:#x}"
    return f"{'! ' if match.negated else ''}{ADDRESS_FLAGS[match.field]} {value}"


def _iptables_target(verdict: Verdict) -> str:
    if verdict.kind == "jump":
        return verdict.target
    return verdict.kind.upper() + (" --random-fully" if verdict.fully_random else "")
