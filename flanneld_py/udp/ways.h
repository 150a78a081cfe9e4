/* What pump.c shares with the two directions. */
#ifndef FLANNELD_UDP_WAYS_H
#define FLANNELD_UDP_WAYS_H

#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>

#include "pump.h"

#define BUFFER (65536 + 64)                  /* holds the largest packet and its vnet header */
#define RETRY_OFFLOAD_NS (60 * 1000000000ull) /* for so long a refused offload is not tried again */
#define LANES 32

/* A table and the bytes it is a view of. */
struct held {
    struct table table;
    struct held *next; /* of those put out of use */
    uint8_t bytes[];
};

/* One direction. All is its thread's own, but for what is atomic: read by others, written by nobody else. */
struct direction {
    _Alignas(64) _Atomic(struct held *) in_use; /* a hazard pointer: this table may not be freed */
    _Atomic uint64_t busy_since;                /* nanoseconds, of its last step; 0: waits for packets */
    uint64_t failing_since;                     /* of reads that failed, and nothing else since; 0: none */
    char failure[128];
    _Atomic bool parked;                        /* reads no more */
    pthread_t thread;
    _Atomic uint64_t counts[COUNTS_OF_TRAFFIC];
    _Atomic uint64_t drops[DROPS];
};

/* The kernel counts what waits in a queue of the underlay for the socket that sent it. Each share of the peers has one
 * of its own, a lane, so that a peer behind a full queue holds up none but those that share its lane. */
struct pump {
    int tun, udp, failure_fd;
    int lanes[LANES]; /* bound as `udp`, and receive nothing; `udp` itself where the kernel does not allow it */
    int icmp4, icmp6; /* raw sockets, or -1 */
    struct offloads offloads;
    bool running;
    _Atomic(struct held *) current;
    struct held *retired;
    _Atomic bool parking;
    _Atomic(const char *) failure;
    struct direction ways[WAYS];
};

static inline void count(_Atomic uint64_t *counter, uint64_t more)
{
    /* Its only writer: no locked instruction is needed. */
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + more, memory_order_relaxed);
}

uint64_t pump_now(void); /* nanoseconds, monotonic */

/* Before each read that may wait: does not return once pump_park was called. */
void pump_may_read(struct pump *pump, enum way way);

/* Around each batch: the table that holds for it. */
const struct table *batch_begin(struct pump *pump, enum way way);
void batch_end(struct pump *pump, enum way way);

/* A batch goes on: it does not hang. */
void batch_goes_on(struct pump *pump, enum way way);

/* Once, when all else is set. */
void pump_open_lanes(struct pump *pump);

/* Where to send to a peer. */
int pump_lane(const struct pump *pump, uint32_t address_be);

/* For which reason a packet is dropped that a lane did not take. */
enum drop pump_refusal(int error);

/* Not through the TUN: what comes from there with an address of this host is a martian, and dropped. */
bool pump_send_icmp(const struct pump *pump, const uint8_t *packet, size_t length);

/* The inner MTU the kernel knows for a peer, 0 when it knows none. Only a connected socket can be asked. */
uint16_t pump_path_mtu(const struct sockaddr_in *to);

/* No packet will ever come or go again: wakes pump_wait. Does not return. */
_Noreturn void pump_fail(struct pump *pump, const char *why);

/* A read failed with an errno that is no reason to end at once: does not spin, and does not return when nothing but
 * this has happened for seconds. */
void pump_read_failed(struct pump *pump, enum way way, int error);

void *send_loop(void *pump);
void *receive_loop(void *pump);

#endif
