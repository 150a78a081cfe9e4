"""What etcd must show at the revision that a watch resumes from."""

from __future__ import annotations

from flanneld_py.core.history import History
from flanneld_py.model import Change, Changes, Entry, Fingerprint, Listing


def put(key: str, at: int) -> Change:
    return Change(key, Entry(key, b"", at, at))


def history() -> History:
    known = History()
    known.begin(Listing(20, 1, (Entry("config", b"", 3, 3), Entry("subnets/a", b"", 4, 9))))
    return known


def test_listing() -> None:
    assert History().resume() == Fingerprint(0, 0)
    assert history().resume() == Fingerprint(2, 9)
    again = history()
    again.extend(Changes(21, (put("subnets/b", 21),)))
    again.begin(Listing(25, 1, ()))
    assert again.resume() == Fingerprint(0, 0)


def test_changes() -> None:
    known = history()
    known.extend(Changes(22, (put("subnets/b", 21), put("config", 22))))
    assert known.resume() == Fingerprint(3, 22)
    known.extend(Changes(23, (Change("config", None), Change("never there", None))))
    assert known.resume() == Fingerprint(2, 21)
    known.extend(Changes(30, ()))
    assert known.resume() == Fingerprint(2, 21)


def test_fragments_count_when_they_are_complete() -> None:
    known = history()
    known.extend(Changes(20, (put("subnets/b", 21), Change("config", None))))
    known.extend(Changes(20, (put("subnets/a", 21),)))
    known.extend(Changes(21, (put("subnets/d", 21),)))
    assert known.resume() == Fingerprint(3, 21)


def test_incomplete_fragments_are_sent_again() -> None:
    known = history()
    known.extend(Changes(20, (put("subnets/b", 21), Change("config", None))))
    assert known.resume() == Fingerprint(2, 9)
    known.extend(Changes(30, (put("subnets/c", 30),)))
    assert known.resume() == Fingerprint(3, 30), "what the interrupted watch had sent is not counted"
