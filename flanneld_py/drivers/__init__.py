"""Effects: one outside thing each (etcd, links, bulk netlink tables, files)."""
