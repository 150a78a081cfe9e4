#!/bin/sh
# Docker's options from flannel's subnet.env, for hosts without flannelctl, which has the same as `docker-opts`.
# Any POSIX shell will do, with awk, sed, sort, and ip.

usage() {
    cat >&2 <<'TEXT'
usage: mk-docker-opts.sh [-f FILE] [-d FILE] [-i] [-c] [-k KEY] [-m]

Writes Docker's options for this host's flannel subnet into a file for Docker's service.

  -f FILE  flannel's file           [/run/flannel/subnet.env]
  -d FILE  the file to write        [/run/docker_opts.env]
  -i       only a DOCKER_OPT_ variable for each option
  -c       only one variable for all
  -k KEY   the name of that one     [DOCKER_OPTS]
  -m       leave --ip-masq out
TEXT
    exit 1
}

say() { printf 'mk-docker-opts.sh: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 1
}

flannel_env=/run/flannel/subnet.env
docker_env=/run/docker_opts.env
key=DOCKER_OPTS
individual='' combined='' ipmasq=yes
while getopts :f:d:k:icmh option; do
    case $option in
        f) flannel_env=$OPTARG ;;
        d) docker_env=$OPTARG ;;
        k) key=$OPTARG ;;
        i) individual=yes ;;
        c) combined=yes ;;
        m) ipmasq='' ;;
        :) say "-$OPTARG: expected a value behind it" && usage ;;
        h) usage ;;
        *)
            [ "$OPTARG" = '?' ] || say "-$OPTARG: no such option"
            usage
            ;;
    esac
done
shift $((OPTIND - 1))
[ $# = 0 ] || { say "$1: expected nothing behind the options" && usage; }
[ -n "$individual$combined" ] || individual=yes combined=yes
case $key in
    '' | [0-9]* | *[!A-Za-z0-9_]*) die "-k '$key': expected the name of a variable, such as DOCKER_OPTS" ;;
esac

# What the file assigns is exported, so that awk below sees it.
set -a
if [ -e "$flannel_env" ]; then
    case $flannel_env in
        */*) ;;
        *) flannel_env=./$flannel_env ;; # else the shell looks for it in $PATH
    esac
    [ -r "$flannel_env" ] || die "$flannel_env: cannot be read"
    # shellcheck source=/dev/null
    . "$flannel_env"
fi
set +a
[ -z "$FLANNEL_SUBNET" ] || export DOCKER_OPT_BIP="--bip=$FLANNEL_SUBNET"
if [ -n "$ipmasq" ]; then
    # What flannel masquerades, Docker need not.
    case $FLANNEL_IPMASQ in
        '') ;;
        true) export DOCKER_OPT_IPMASQ=--ip-masq=false ;;
        false) export DOCKER_OPT_IPMASQ=--ip-masq=true ;;
        *) die "FLANNEL_IPMASQ=$FLANNEL_IPMASQ: expected true or false; restart the flannel daemon" ;;
    esac
fi
[ -z "$FLANNEL_MTU" ] || export DOCKER_OPT_MTU="--mtu=$FLANNEL_MTU"

# A line as systemd and a shell read it back: both know these four escapes between double quotes.
assignment() { printf '%s="%s"\n' "$1" "$(printf '%s' "$2" | sed 's/[\\"`$]/\\&/g')"; }

# The names of the variables with an option: ours, and those that were there before. Not by `set`, whose output
# has values in it that look like names.
names=$(LC_ALL=C awk 'BEGIN { for (name in ENVIRON) if (name ~ /^[A-Za-z_][A-Za-z0-9_]*$/ && name ~ /DOCKER_OPT_/) print name }' |
    LC_ALL=C sort)
lines='' all=''
newline='
'
for name in $names; do
    eval "value=\$$name"
    # shellcheck disable=SC2154 # eval assigned it
    [ -z "$individual" ] || lines=$lines$(assignment "$name" "$value")$newline
    all="$all $value"
done
if [ -n "$combined" ]; then
    eval "before=\${$key:-}"
    # shellcheck disable=SC2154 # eval assigned it
    lines=$lines$(assignment "$key" "${before:+$before }$all")$newline
fi
{ printf '%s' "$lines" >"$docker_env"; } 2>/dev/null || die "$docker_env: cannot be written"

if [ -z "$FLANNEL_SUBNET" ]; then
    say "no FLANNEL_SUBNET in $flannel_env nor in the environment: Docker will choose a subnet of its own;" \
        "is the flannel daemon ready?"
    exit 0
fi

# --- whether the subnet is this host's -----------------------------------------------------------

# network ADDRESS/LENGTH: its first address and length, nothing when it is no such thing.
network() {
    printf '%s\n' "$1" | awk -F '[./]' '
        /^[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+\/[0-9]+$/ && $5 <= 32 {
            left = $5
            for (i = 1; i <= 4; i++) {
                size = 256 # by halves: some awk of busybox has no powers
                for (; size > 1 && left > 0; left--) size /= 2
                $i -= $i % size
            }
            printf "%d.%d.%d.%d%s\n", $1, $2, $3, $4, $5 < 32 ? "/" $5 : ""
        }'
}

subnet=$(network "$FLANNEL_SUBNET")
gateway=$(ip -4 route show 2>/dev/null | awk -v subnet="$subnet" '
    $1 == subnet { for (i = 2; i < NF; i++) if ($i == "via") { print $(i + 1) " dev " $(i + 3); exit } }')
[ -z "$gateway" ] ||
    die "FLANNEL_SUBNET=$FLANNEL_SUBNET: this host has a route to that subnet via $gateway, so it is another" \
        "host's; restart the flannel daemon, or remove the route if $flannel_env is right"
