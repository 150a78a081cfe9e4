"""Whether the etcd that a watch resumes at is the one it was interrupted at.

A wiped or restored etcd may have the same cluster id, which comes from its --initial-cluster, and when others
write to it, it soon has our revision, too. Its watch would then go on as if nothing were missing.
"""

from __future__ import annotations

from flanneld_py.model import Change, Changes, Fingerprint, Listing


class History:
    """Key → mod_revision of everything below the prefix, at the revision to resume from."""

    def __init__(self) -> None:
        self._revision = 0
        self._known: dict[str, int] = {}
        self._ahead: list[Change] = []
        """Of a later revision, of which more is to come."""

    def begin(self, listing: Listing) -> None:
        self._revision = listing.revision
        self._known = {entry.key: entry.mod_revision for entry in listing.entries}
        self._ahead.clear()

    def extend(self, changes: Changes) -> None:
        """One item of a watch; fragments of a response repeat the revision before them."""
        self._ahead += changes.changes
        if changes.revision == self._revision:
            return
        self._revision = changes.revision
        for change in self._ahead:
            if change.entry is None:
                self._known.pop(change.key, None)
            else:
                self._known[change.key] = change.entry.mod_revision
        self._ahead.clear()

    def resume(self) -> Fingerprint:
        """What etcd must show at the revision to resume from; it will send again what came after that."""
        self._ahead.clear()
        return Fingerprint(len(self._known), max(self._known.values(), default=0))
