/* Moves packets between a TUN and a UDP socket, one thread for each direction, until the process ends.
 *
 * pump.c life, table, counters · send.c TUN → UDP · lanes.c sockets for it · receive.c UDP → TUN. What becomes of a
 * packet is decided by packet.h; here are the descriptors, the batches, and what to do when the kernel refuses
 * something.
 */
#ifndef FLANNELD_UDP_PUMP_H
#define FLANNELD_UDP_PUMP_H

#include <stdbool.h>
#include <stdint.h>

#include "packet.h"

/* What each direction counts, besides a drop reason each. Names are what users see. */
#define COUNTS(X)                                                                                                      \
    X(COUNT_PACKETS, "packets")                 /* inner packets handed on, each segment counted */                    \
    X(COUNT_BYTES, "bytes")                     /* of these packets */                                                 \
    X(COUNT_SUPER_PACKETS, "super-packets")     /* exchanged with the TUN */                                           \
    X(COUNT_READS, "reads")                     /* system calls that brought packets */                                \
    X(COUNT_WRITES, "writes")                   /* system calls that took packets */                                   \
    X(COUNT_ICMP_ERRORS, "icmp-errors")         /* sent to packets' senders */                                         \
    X(COUNT_FRAGMENTED, "fragmented")           /* packets cut for a path narrower than the MTU */                     \
    X(COUNT_OFFLOAD_REFUSED, "offload-refused") /* batches the kernel took only packet by packet */                    \
    X(COUNT_READ_ERRORS, "read-errors")         /* reads that failed */                                                \
    X(COUNT_BUSY_MS, "busy-ms")                 /* not a count: milliseconds it has not got on, or 0 */

enum count {
#define X(symbol, name) symbol,
    COUNTS(X)
#undef X
        COUNTS_OF_TRAFFIC
};

enum way { SEND, RECEIVE, WAYS };

#define COUNTERS (WAYS * (COUNTS_OF_TRAFFIC + DROPS - 1)) /* without DROP_NONE */

struct offloads {
    bool tso, uso, udp_segment, udp_gro;
};

struct pump;

/* A pump for these descriptors, which stay the caller's and must stay open. The TUN must have IFF_VNET_HDR. Of
 * `offloads` those that the kernel does not have are unset. NULL: errno says why, and `what` which step it was. */
struct pump *pump_new(int tun, int udp, struct offloads *offloads, const char **what);

/* From the next batch on; the first one starts the threads. Never waits for packets. Returns NULL or what is wrong
 * with the table, which then changes nothing. One caller at a time. */
const char *pump_set_table(struct pump *pump, const uint8_t *bytes, size_t length);

/* Counters in the order of pump_counter_name, read while everything goes on. */
void pump_counters(const struct pump *pump, uint64_t counters[COUNTERS]);

/* "send.packets", "receive.drop.ttl-zero"; at most 63 characters. */
void pump_counter_name(unsigned counter, char name[64]);

/* Waits until `fd` can be read: NULL. Or returns why no packets can be forwarded any more. */
const char *pump_wait(struct pump *pump, int fd);

/* Finishes the batches in hand and takes no more; gives up waiting for that after 50 ms. */
void pump_park(struct pump *pump);

#endif
