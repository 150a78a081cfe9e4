"""The threads of the daemon: each owns one blocking wait and hands over frozen values."""
