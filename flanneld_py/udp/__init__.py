"""The udp data plane: a child process that moves packets between a TUN and peers, in C or pure Python."""
