"""flanneld-py on a kernel without vxlan: it asks for a kind of device that this one does not have, either.

What the kernel says to that is the same, and what is made of it is what a test looks at.
"""

from __future__ import annotations

from typing import Any

from flanneld_py.cli.daemon import main
from flanneld_py.drivers.kernel import KernelLinks
from flanneld_py.drivers.linkmessages import Request

NO_KIND = "xvlan"


def _asking_for_another(send: Any) -> Any:
    def renamed(links: KernelLinks, *requests: Request) -> Any:
        return send(
            links,
            *(
                request._replace(arguments={**request.arguments, "kind": NO_KIND})
                if request.arguments.get("kind") == "vxlan"
                else request
                for request in requests
            ),
        )

    return renamed


if __name__ == "__main__":
    KernelLinks._send = _asking_for_another(KernelLinks._send)  # type: ignore[method-assign]
    main()
