"""flannelctl, one file a command group."""
