"""The commands: flanneld-py and flannelctl."""
