/* UDP → TUN: datagrams are checked, and what belongs together is joined into super-packets. */
#include "ways.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef UDP_GRO
#define UDP_GRO 104
#endif

#define MESSAGES 64     /* received at once */
#define LARGE 16384     /* bytes of a message in the mean, from which on */
#define FEW_MESSAGES 8  /* are received at once, so that they stay in a core's cache */

struct receiver {
    struct pump *pump;
    struct direction *own;
    const struct table *table;
    struct cursor cursor;
    uint64_t now;
    uint64_t no_tcp_until, no_udp_until; /* the TUN refused such super-packets */
    uint8_t *buffers;                    /* MESSAGES of BUFFER bytes */
    struct mmsghdr messages[MESSAGES];
    struct iovec iov[MESSAGES];
    struct sockaddr_in from[MESSAGES];
    struct {
        _Alignas(struct cmsghdr) char bytes[CMSG_SPACE(sizeof(int))];
    } control[MESSAGES];
    struct joiner joiner;
};

/* ---- To the TUN ------------------------------------------------------------------------------------------------- */

static bool write_tun(struct receiver *r, const struct iovec *iov, size_t pieces)
{
    ssize_t written;
    count(&r->own->counts[COUNT_WRITES], 1);
    while ((written = writev(r->pump->tun, iov, (int)pieces)) < 0 && errno == EINTR)
        ;
    return written >= 0;
}

static void count_written(struct receiver *r, uint64_t packets, uint64_t bytes)
{
    count(&r->own->counts[COUNT_PACKETS], packets);
    count(&r->own->counts[COUNT_BYTES], bytes);
}

/* The TUN refused a super-packet: its packets one by one, and no more of its kind for a while. */
static void write_split(struct receiver *r, size_t entry, const struct vnet *refused)
{
    struct vnet plain = {0};
    struct iovec packets[JOIN_SEGMENTS];
    size_t number = join_split(&r->joiner, entry, packets);
    uint64_t *until = refused->gso_type == VNET_GSO_UDP_L4 ? &r->no_udp_until : &r->no_tcp_until;
    *until = r->now + RETRY_OFFLOAD_NS;
    count(&r->own->counts[COUNT_OFFLOAD_REFUSED], 1);
    for (size_t i = 0; i < number; i++) {
        const struct iovec iov[2] = {{.iov_base = &plain, .iov_len = sizeof plain}, packets[i]};
        if (write_tun(r, iov, 2))
            count_written(r, 1, packets[i].iov_len);
        else
            count(&r->own->drops[DROP_WRITE_FAILED], 1);
    }
}

static void write_entries(struct receiver *r)
{
    struct vnet vnet;
    uint8_t header[JOIN_HEADER_MAX];
    struct iovec iov[JOIN_SEGMENTS + 2];
    for (size_t entry = 0; entry < r->joiner.count; entry++) {
        size_t pieces = join_write(&r->joiner, entry, &vnet, header, iov);
        uint16_t packets = r->joiner.entries[entry].count;
        if (write_tun(r, iov, pieces)) {
            count_written(r, packets, join_bytes(&r->joiner, entry));
            count(&r->own->counts[COUNT_SUPER_PACKETS], vnet.gso_type != VNET_GSO_NONE);
        } else if (vnet.gso_type != VNET_GSO_NONE && errno == EINVAL) {
            write_split(r, entry, &vnet);
        } else {
            count(&r->own->drops[DROP_WRITE_FAILED], packets);
        }
    }
    batch_goes_on(r->pump, RECEIVE);
}

static void empty_joiner(struct receiver *r)
{
    unsigned tcp = r->pump->offloads.tso && r->no_tcp_until <= r->now ? JOIN_TCP : 0;
    unsigned udp = r->pump->offloads.uso && r->no_udp_until <= r->now ? JOIN_UDP : 0;
    join_reset(&r->joiner, tcp | udp);
}

/* ---- From the socket --------------------------------------------------------------------------------------------- */

static void accept_packet(struct receiver *r, uint32_t sender, const uint8_t *packet, size_t length)
{
    struct inner inner;
    enum drop reason = packet_accept(r->table, &r->cursor, sender, packet, length, &inner);
    if (reason != DROP_NONE) {
        count(&r->own->drops[reason], 1);
        return;
    }
    if (join_add(&r->joiner, packet, &inner))
        return;
    write_entries(r);
    empty_joiner(r);
    join_add(&r->joiner, packet, &inner);
}

/* Bytes of each datagram in what UDP_GRO has put together; only the last may be shorter. */
static size_t datagram_size(struct msghdr *message, size_t length)
{
    struct cmsghdr *control;
    int size;
    for (control = CMSG_FIRSTHDR(message); control != NULL; control = CMSG_NXTHDR(message, control)) {
        if (control->cmsg_level != IPPROTO_UDP || control->cmsg_type != UDP_GRO)
            continue;
        memcpy(&size, CMSG_DATA(control), sizeof size);
        if (size > 0)
            return (size_t)size;
    }
    return length;
}

static void accept_message(struct receiver *r, int number)
{
    struct msghdr *message = &r->messages[number].msg_hdr;
    const uint8_t *packet = r->iov[number].iov_base;
    size_t left = r->messages[number].msg_len, size = datagram_size(message, left);
    uint32_t sender = table_find_peer(r->table, r->from[number].sin_addr.s_addr);
    if ((message->msg_flags & MSG_TRUNC) != 0) {
        count(&r->own->drops[DROP_TRUNCATED], 1);
        return;
    }
    do { /* an empty datagram is one as well */
        size_t length = left < size ? left : size;
        accept_packet(r, sender, packet, length);
        packet += length;
        left -= length;
    } while (left != 0);
}

static void prepare_messages(struct receiver *r, int number)
{
    for (int i = 0; i < number; i++) {
        r->messages[i].msg_hdr.msg_namelen = sizeof r->from[i];
        r->messages[i].msg_hdr.msg_controllen = sizeof r->control[i].bytes;
    }
}

static struct receiver *new_receiver(struct pump *pump)
{
    struct receiver *r = calloc(1, sizeof *r);
    void *buffers = mmap(NULL, (size_t)MESSAGES * BUFFER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (r == NULL || buffers == MAP_FAILED)
        pump_fail(pump, "no memory for the packets to be received");
    r->pump = pump;
    r->own = &pump->ways[RECEIVE];
    r->buffers = buffers;
    for (size_t i = 0; i < MESSAGES; i++) {
        r->iov[i] = (struct iovec){.iov_base = r->buffers + i * BUFFER, .iov_len = BUFFER};
        r->messages[i].msg_hdr = (struct msghdr){.msg_name = &r->from[i],
                                                 .msg_iov = &r->iov[i],
                                                 .msg_iovlen = 1,
                                                 .msg_control = r->control[i].bytes};
    }
    return r;
}

void *receive_loop(void *argument)
{
    struct pump *pump = argument;
    struct receiver *r = new_receiver(pump);
    int most = MESSAGES;
    for (;;) {
        pump_may_read(pump, RECEIVE);
        prepare_messages(r, most);
        int number = recvmmsg(pump->udp, r->messages, (unsigned)most, MSG_WAITFORONE, NULL);
        if (number < 0) {
            if (errno == EBADF || errno == ENOTSOCK)
                pump_fail(pump, "the UDP socket is gone");
            pump_read_failed(pump, RECEIVE, errno);
            continue;
        }
        r->table = batch_begin(pump, RECEIVE);
        r->now = pump_now();
        count(&r->own->counts[COUNT_READS], 1);
        empty_joiner(r);
        size_t bytes = 0;
        for (int i = 0; i < number; i++) {
            bytes += r->messages[i].msg_len;
            accept_message(r, i);
        }
        write_entries(r);
        batch_end(pump, RECEIVE);
        most = bytes > (size_t)number * LARGE ? FEW_MESSAGES : MESSAGES;
    }
    return NULL;
}
