#!/bin/sh
# supervisord runs this (flanneld-py.conf), which becomes the daemon: by `exec`, so that supervisord's signals reach it and
# its exit code is supervisord's. More flags may stand behind the command.
set -eu

: "${ETCD_ENDPOINTS:?expected URLs of etcd, with commas between them}"
: "${ETCD_CERTS:=/etc/flanneld-py}" # a directory with ca.crt, client.crt, client.key
: "${IFACE:=eth0}"
: "${PUBLIC_IP:=}" # empty: the first one of IFACE
: "${SUBNET_FILE:=/run/flannel/subnet.env}"
: "${HEALTHZ_PORT:=0}"

set -- --etcd-endpoints="$ETCD_ENDPOINTS" --iface="$IFACE" --subnet-file="$SUBNET_FILE" --healthz-port="$HEALTHZ_PORT" "$@"
if [ -n "$PUBLIC_IP" ]; then set -- --public-ip="$PUBLIC_IP" "$@"; fi
case $ETCD_ENDPOINTS in
    https:*)
        set -- --etcd-cafile="$ETCD_CERTS/ca.crt" \
            --etcd-certfile="$ETCD_CERTS/client.crt" --etcd-keyfile="$ETCD_CERTS/client.key" "$@"
        ;;
esac
exec /usr/local/bin/flanneld-py "$@"
