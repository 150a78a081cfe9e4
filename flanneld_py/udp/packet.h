/* The pure core of the udp data plane: what happens to a packet, without where it comes from or goes to.
 *
 *   TUN → UDP   packet_route → packet_fit → packet_finish → (segments_* | fragments_* | as it is) → the peer
 *   UDP → TUN   packet_accept → join_add … join_write → the TUN
 *   a drop that its sender should hear of: icmp_for → icmp_allowed → icmp_error → the TUN
 *
 * No system calls, no allocation, no global state, no threads: memory is the caller's, time is an argument, and all
 * functions may run at once on different objects. Any alignment, any endianness. A `packet` is a bare IP packet, as
 * it travels in a UDP datagram: flannel's wire format has no header of its own. Lengths are bytes. Numbers in structs
 * are in host order, except where a name ends in _be. Everything comes from outside and nothing in it is believed:
 * any bytes of any length are a legal argument.
 *
 * table.c: table, look-up · packet.c: one packet's checks, checksums, TTL · segment.c: cutting · join.c · icmp.c
 */
#ifndef FLANNELD_UDP_PACKET_H
#define FLANNELD_UDP_PACKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h> /* struct iovec, for writev and sendmsg */

/* ---- Why a packet is dropped ------------------------------------------------------------------------------------
 * One list for both directions; each direction has a counter for each. Names are what users see: they never change. */

#define DROP_REASONS(X)                                                                                                \
    X(DROP_NONE, "none")                                 /* not dropped; its counter stays 0 */                        \
    X(DROP_TOO_SHORT, "too-short")                       /* shorter than an IP header of its version */                \
    X(DROP_VERSION, "version")                           /* neither IPv4 nor IPv6 */                                   \
    X(DROP_HEADER_LENGTH, "header-length")               /* IPv4 header below 20 bytes, or beyond the packet */        \
    X(DROP_TOTAL_LENGTH, "total-length")                 /* the header's length is not the packet's */                 \
    X(DROP_HEADER_CHECKSUM, "header-checksum")           /* received: IPv4 header checksum wrong */                    \
    X(DROP_TTL_ZERO, "ttl-zero")                         /* received with TTL or hop limit 0 */                        \
    X(DROP_OUTER_SOURCE, "outer-source-unknown")         /* received from an address that is no peer's */              \
    X(DROP_INNER_DESTINATION, "inner-destination")       /* received for an address outside our subnet */              \
    X(DROP_INNER_SOURCE, "inner-source")                 /* received with a source SourceCheck forbids this peer */    \
    X(DROP_IPV6_NOT_AGREED, "ipv6-not-agreed")           /* IPv6 from or to a peer that has not announced it */        \
    X(DROP_NO_ROUTE, "no-route")                         /* to send: no peer has the destination (ICMP) */             \
    X(DROP_TTL_EXCEEDED, "ttl-exceeded")                 /* to send: TTL or hop limit would reach 0 (ICMP) */          \
    X(DROP_TOO_BIG, "too-big")                           /* to send: path too narrow, fragments forbidden (ICMP) */    \
    X(DROP_OFFLOAD, "offload")                           /* to send: the TUN's vnet header does not fit its packet */  \
    X(DROP_SEND_FAILED, "send-failed")                   /* the socket refused it */                                   \
    X(DROP_QUEUE_FULL, "queue-full")                     /* to send: as much as may wait for its peer does already */  \
    X(DROP_WRITE_FAILED, "write-failed")                 /* the TUN refused it */                                      \
    X(DROP_TRUNCATED, "truncated")                       /* longer than the buffer it was read into */

enum drop {
#define X(symbol, name) symbol,
    DROP_REASONS(X)
#undef X
        DROPS /* how many there are */
};

/* names[reason]: kebab-case, DROPS of them. */
extern const char *const drop_names[DROPS];

/* ---- The table: who the peers are, and which addresses each has --------------------------------------------------
 *
 * Packed by table.py, in one piece, little-endian where not noted, no padding:
 *
 *    0  4  magic "FPT1"
 *    4  4  length of the whole table
 *    8  1  enum source_check
 *    9  1  1: own IPv4 subnet and address are set · 2: those of IPv6 are (unset ones are zero)
 *   10  2  MTU of the TUN, 68…65507
 *   12  4  number of peers            then, each sorted, in this order:
 *   16  4  number of IPv4 ranges        peers      8   address (network order), port (network order), PEER_… flags
 *   20  4  number of IPv6 ranges        ranges4   12   first, last (numbers), index of the peer
 *   24  4  number of IPv4 networks      ranges6   36   first, last (16 bytes, network order), index of the peer
 *   28  4  number of IPv6 networks      networks4  8   first, last (numbers)
 *   32  8  own IPv4 subnet: first, last (numbers)
 *   40  4  own IPv4 address (number)    networks6 32   first, last (16 bytes, network order)
 *   44 32  own IPv6 subnet: first, last
 *   76 16  own IPv6 address
 *   92     peers …
 *
 * Peers are sorted by address, each once. Ranges and networks are sorted and disjoint: table.py has resolved longest
 * prefix, so that a look-up is one binary search. Networks are what SourceCheck means by "inside the Network".
 */

#define TABLE_HEADER 92
#define TABLE_NETWORKS_MAX 16 /* of one family */
#define PEER_IPV6 1           /* flag: its record announces IPv6 inside the tunnel */
#define PEER_UNKNOWN UINT32_MAX

enum source_check {
    SOURCE_ANY = 0,     /* `false`: not looked at */
    SOURCE_NETWORK = 1, /* `true`: a source inside a Network must belong to the sending peer, others pass */
    SOURCE_STRICT = 2,  /* `strict`: it must belong to the sending peer */
};

/* A view of a packed table, which must stay where it is, unchanged. Made by table_open; read-only afterwards, so any
 * number of threads may use it. */
struct table {
    const uint8_t *peers, *ranges4, *ranges6, *networks4, *networks6;
    uint32_t peer_count, range4_count, range6_count, network4_count, network6_count;
    uint32_t own4_first, own4_last, address4;
    const uint8_t *own6_first, *own6_last, *address6; /* 16 bytes each */
    bool has4, has6;
    uint16_t mtu;
    enum source_check source_check;
};

struct peer {
    uint32_t address_be; /* for sin_addr */
    uint16_t port_be;    /* for sin_port */
    uint16_t flags;
};

/* Where the last look-up ended: the next one begins there, which saves the search while a flow goes on. One for each
 * thread; zeroes are right; stays valid over any change of tables. */
struct cursor {
    uint32_t range4, range6;
};

/* Checks everything `bytes` claims, then sets up `table`. Returns NULL, or what is wrong ("ranges4: not sorted, or
 * overlapping"), and then leaves `table` alone. Linear in the table's length. */
const char *table_open(struct table *table, const uint8_t *bytes, size_t length);

/* The peer at `index`, which is one a look-up returned. */
struct peer table_peer(const struct table *table, uint32_t index);

/* The index of the peer with this outer address, or PEER_UNKNOWN. The port is not compared: a NAT may change it. */
uint32_t table_find_peer(const struct table *table, uint32_t address_be);

/* The index of the peer to whom an inner address (network order, 4 or 16 bytes) belongs, or PEER_UNKNOWN. */
uint32_t table_route4(const struct table *table, struct cursor *cursor, const uint8_t *address);
uint32_t table_route6(const struct table *table, struct cursor *cursor, const uint8_t *address);

/* ---- Checksums (RFC 1071) ------------------------------------------------------------------------------------- */

/* Adds the 16-bit words of `bytes` (in memory order, an odd last byte padded with 0) to `sum`, without folding.
 * `bytes` must begin at an even distance from what was summed before. */
uint64_t checksum_add(uint64_t sum, const uint8_t *bytes, size_t length);

/* Folds a sum to 16 bits, not complemented, in memory order: store with memcpy. */
uint16_t checksum_fold(uint64_t sum);

/* ---- One packet ------------------------------------------------------------------------------------------------- */

#define IPV4_HEADER 20
#define IPV6_HEADER 40

/* What the checks found out; lengths are true of the packet. */
struct inner {
    uint32_t length;        /* of the packet; super-packets may have up to 65,575 (IPv6) */
    uint16_t header_length; /* of the IPv4 header with options, or 40: IPv6 extension headers are not counted */
    uint8_t family;         /* 4 or 6 */
    uint8_t protocol;       /* IPv4 protocol, or IPv6 first next header */
    bool fragment;          /* IPv4: an offset or "more fragments" */
};

/* The header the kernel puts before each packet on a TUN with IFF_VNET_HDR: struct virtio_net_hdr of
 * linux/virtio_net.h, fields in host order, 10 bytes without padding, so it may be read and written as it is. */
struct vnet {
    uint8_t flags;        /* VNET_NEEDS_CSUM */
    uint8_t gso_type;     /* VNET_GSO_… */
    uint16_t hdr_len;     /* a hint; not believed */
    uint16_t gso_size;    /* payload of each segment */
    uint16_t csum_start;  /* from the packet's begin: where the sum begins */
    uint16_t csum_offset; /* from csum_start: where the checksum goes; holds the pseudo header's sum until then */
};
_Static_assert(sizeof(struct vnet) == 10, "the kernel's layout");

#define VNET_NEEDS_CSUM 1
#define VNET_GSO_NONE 0
#define VNET_GSO_TCPV4 1
#define VNET_GSO_TCPV6 4
#define VNET_GSO_UDP_L4 5 /* USO, kernels from 6.2 */
#define VNET_GSO_ECN 0x80 /* a flag beside the type: the first segment has CWR */

/* Length checks (too-short, version, header-length, total-length, in this order) of any packet; fills in `inner`
 * when the answer is DROP_NONE. */
enum drop packet_parse(const uint8_t *packet, size_t length, struct inner *inner);

/* Received from the peer with index `sender` (PEER_UNKNOWN: from a stranger): may it enter our TUN? The checks, in
 * this order: packet_parse, header-checksum, ttl-zero, outer-source-unknown, inner-destination, inner-source,
 * ipv6-not-agreed. Changes nothing: TTL was decremented by the sender. `cursor` is for sources. */
enum drop packet_accept(const struct table *table, struct cursor *cursor, uint32_t sender, const uint8_t *packet,
                        size_t length, struct inner *inner);

/* To be sent, as read from the TUN: to whom? packet_parse, then no-route, ipv6-not-agreed, ttl-exceeded (no route
 * comes before TTL, as in the kernel's forwarding). Changes nothing, so that ICMP can quote the packet. `cursor` is
 * for destinations. `peer` is set when the answer is DROP_NONE, and for ipv6-not-agreed and ttl-exceeded. */
enum drop packet_route(const struct table *table, struct cursor *cursor, const uint8_t *packet, size_t length,
                       struct inner *inner, uint32_t *peer);

/* How a packet, or each segment of a super-packet, goes through a path that carries inner packets of `mtu` bytes. */
enum fit {
    FIT_WHOLE,
    FIT_FRAGMENTS, /* IPv4 without DF: fragments_begin (a super-packet's segments: one by one) */
    FIT_TOO_BIG,   /* count it DROP_TOO_BIG and answer with icmp_error */
};
enum fit packet_fit(const uint8_t *packet, const struct inner *inner, const struct vnet *vnet, uint16_t mtu);

/* Our hop: decrements TTL with RFC 1624's update of the checksum, and, unless it is a super-packet (segments_next
 * does it then), finishes the transport checksum the kernel has left to us, as skb_checksum_help does. Returns
 * DROP_NONE; DROP_OFFLOAD, before any change, when the sum would lie outside the packet. */
enum drop packet_finish(uint8_t *packet, const struct inner *inner, const struct vnet *vnet);

/* ---- Cutting a super-packet into the segments its sender would have sent ----------------------------------------- */

#define SEGMENT_HEADER_MAX 256 /* IP header, options or extension headers, and TCP or UDP header */
#define TCP_SEGMENTS_MAX 2048  /* 64 KiB of the least TCP sends: net.ipv4.tcp_min_snd_mss, 48, less a timestamp */
#define UDP_SEGMENTS_MAX 128   /* UDP_MAX_SEGMENTS of the kernel, 64 before 6.9 */

/* Private to segment.c, but for `count`, `header_length` and `size`. */
struct segments {
    const uint8_t *packet;
    uint32_t length, offset; /* of the packet; of the next segment's payload in it */
    uint32_t count;          /* of segments, at least 1 */
    uint16_t header_length;  /* of every segment's headers, together */
    uint16_t size;           /* of every segment's payload; the last one may be shorter */
    uint16_t transport;      /* where the TCP or UDP header begins */
    uint16_t id;             /* IPv4 identification of the next segment */
    uint32_t sequence;       /* TCP: of the next segment */
    uint8_t family, protocol, tcp_flags;
    uint64_t network_sum, transport_sum; /* of the fields that all segments share */
};

/* After packet_finish, for a vnet with a gso_type. Returns DROP_NONE; DROP_OFFLOAD when type, size, protocol or
 * lengths do not go together (UFO and tunnels are never offered by a TUN), or there are more segments than any sender
 * but a malicious one makes. `packet` must stay until the last segments_next. */
enum drop segments_begin(struct segments *segments, const uint8_t *packet, const struct inner *inner,
                         const struct vnet *vnet);

/* Writes the next segment's headers (segments->header_length bytes, checksums right) to `header` and points `payload`
 * at its slice of the super-packet. As the kernel's own segmentation: identification counts up; FIN and PSH only on
 * the last, CWR only on the first (net/ipv4/tcp_offload.c, udp_offload.c). False when there are no more. */
bool segments_next(struct segments *segments, uint8_t header[SEGMENT_HEADER_MAX], struct iovec *payload);

/* How many packets these bytes stand for: 1 for a plain packet, and for what cannot be cut. */
uint32_t segments_count(const uint8_t *packet, size_t length, const struct vnet *vnet);

/* ---- Fragments (RFC 791 3.2), for a path narrower than the sender knows ------------------------------------------ */

#define FRAGMENT_HEADER_MAX 60

/* Private to segment.c. */
struct fragments {
    const uint8_t *packet;
    uint32_t length, offset;
    uint16_t header_length, size, field; /* flags and offset of the packet itself */
};

/* For an IPv4 packet without DF that packet_parse has accepted, transport checksum finished; `mtu` at least 68. */
void fragments_begin(struct fragments *fragments, const uint8_t *packet, const struct inner *inner, uint16_t mtu);

/* Writes the next fragment's header to `header` and points `payload` at its slice. Returns the length of the header,
 * 0 when there are no more. Options that are not to be copied become no-operations after the first, as in Linux. */
size_t fragments_next(struct fragments *fragments, uint8_t header[FRAGMENT_HEADER_MAX], struct iovec *payload);

/* ---- Joining received packets into super-packets ------------------------------------------------------------------
 *
 * A joiner takes the packets of a batch in the order they came. A TCP segment with data that continues its flow's
 * last entry, and an equal-size UDP datagram, is appended to it when cutting the entry again gives the very packets
 * that came (but for the identification of IPv4 packets with DF, which has no meaning: RFC 6864); everything else
 * becomes an entry of its own, and ends its flow's. Entries are written in order, so no flow is ever reordered.
 * Checksums are verified before joining; a packet whose checksum is wrong travels alone, as it is, so that the
 * receiver counts it.
 */

#define JOIN_ENTRIES 256  /* of one batch */
#define JOIN_PIECES 1024  /* packets of one batch */
#define JOIN_SEGMENTS 128 /* TCP segments of one entry */
#define JOIN_DATAGRAMS 64 /* UDP datagrams of one entry: UDP_MAX_SEGMENTS of kernels before 6.9 */
#define JOIN_HEADER_MAX 100
#define JOIN_SLOTS 64
#define JOIN_TCP 1 /* in `allowed` */
#define JOIN_UDP 2

/* One super-packet to be, or one packet. Private to join.c but for `count`. */
struct joined {
    const uint8_t *packet;  /* the first one */
    uint32_t length;        /* of the first packet */
    uint32_t payload;       /* bytes of all */
    uint32_t next_sequence; /* TCP */
    uint16_t first, last;   /* pieces */
    uint16_t count;         /* of packets */
    uint16_t header_length; /* all headers together; 0: never to be joined */
    uint16_t size;          /* payload of every packet but the last */
    uint8_t family, protocol, tcp_flags;
    bool verified; /* the first packet's checksum */
};

struct piece {
    const uint8_t *payload;
    uint16_t length, next;
};

/* 30 KB; private but for `count`. The packets must stay in place until the entries are written. */
struct joiner {
    uint16_t count, pieces; /* of entries; of pieces */
    unsigned allowed;
    uint16_t slots[JOIN_SLOTS]; /* hash of a flow → its open entry + 1; a collision only ends an entry early */
    struct joined entries[JOIN_ENTRIES];
    struct piece pool[JOIN_PIECES];
};

/* Empties the joiner. `allowed`: JOIN_TCP when the TUN takes TSO, JOIN_UDP when it takes USO. Cheap. */
void join_reset(struct joiner *joiner, unsigned allowed);

/* Adds a packet that packet_accept has let in. False when the joiner is full: write its entries, reset, add again. */
bool join_add(struct joiner *joiner, const uint8_t *packet, const struct inner *inner);

/* What to writev to the TUN for an entry (< joiner->count): fills in `vnet`, `header` (when it is a super-packet) and
 * `iov` (vnet first); returns the number of iovecs. The packets themselves are not changed, so this may be repeated,
 * and join_split used when the kernel refuses the super-packet. */
size_t join_write(const struct joiner *joiner, size_t entry, struct vnet *vnet, uint8_t header[JOIN_HEADER_MAX],
                  struct iovec iov[JOIN_SEGMENTS + 2]);

/* Bytes of an entry's packets, each with its headers. */
uint32_t join_bytes(const struct joiner *joiner, size_t entry);

/* The packets of an entry as they came, one iovec each (without vnet headers); returns their number. */
size_t join_split(const struct joiner *joiner, size_t entry, struct iovec iov[JOIN_SEGMENTS]);

/* ---- ICMP errors to the sender (RFC 792, 1122 3.2.2, 1191, 1812 4.3; ICMPv6: RFC 4443) --------------------------- */

#define ICMP_MAX 1280 /* longest answer: 576 for IPv4, 1280 for IPv6, the quoted part included */

enum icmp_kind {
    ICMP_NONE,
    ICMP_NO_ROUTE,      /* 3/0 net unreachable · ICMPv6 1/0 */
    ICMP_TIME_EXCEEDED, /* 11/0 · ICMPv6 3/0 */
    ICMP_TOO_BIG,       /* 3/4 fragmentation needed · ICMPv6 2/0; with the MTU */
    ICMP_KINDS
};

/* What the sender hears when its packet was dropped; ICMP_NONE for most reasons. */
enum icmp_kind icmp_for(enum drop reason);

/* Token bucket, 100 a second, at most 100 at once. Zeroes are right; one for each thread and kind, so that whoever
 * scans the Network does not keep others from hearing of a narrow path. `now`: any monotonic clock in nanoseconds. */
struct icmp_budget {
    uint64_t last, credit; /* nanoseconds */
};
bool icmp_allowed(struct icmp_budget *budget, uint64_t now);

/* Writes to `answer` the ICMP packet that tells the sender of `packet`, from our own address of its family, and
 * returns its length: 0 when none may be sent (about an ICMP error, a later fragment, a source or destination that
 * is not one host) or we have no such address. `mtu` is for ICMP_TOO_BIG: the inner MTU of the path; IPv6 is never
 * told less than 1280. */
size_t icmp_error(const struct table *table, enum icmp_kind kind, uint16_t mtu, const uint8_t *packet,
                  const struct inner *inner, uint8_t answer[ICMP_MAX]);

#endif
