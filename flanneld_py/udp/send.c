/* TUN → UDP: super-packets are cut, and what goes to one peer in equal sizes leaves in one send. */
#include "ways.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

#define ARENA (4 * BUFFER)    /* of packets read and not yet sent: stays in a core's cache */
#define HEADERS (64 * 1024)   /* of segments not yet sent */
#define PACKETS 256           /* taken from the TUN before the table is looked at again */
#define BATCH_NS 10000000     /* for which super-packets are taken, likewise */
#define RUNS 32               /* not yet sent */
#define RUN_SEGMENTS 64       /* UDP_MAX_SEGMENTS of kernels before 6.9 */
#define RUN_BYTES 65507       /* of one send */
#define PATHS 256             /* remembered, by a hash of the address; a collision only forgets */
#define LAST_RUNS 64          /* remembered, likewise */
#define SILENCE_NS 50000       /* between two batches: no flood that gains by waiting for the next packet */
#define PATH_MTU_NS 1000000000 /* then the kernel is asked again, which remembers it for ten minutes */

/* Packets of equal size to one peer, of which only the last may be shorter: one send. */
struct run {
    struct sockaddr_in to;
    int lane;
    uint32_t peer, total;
    uint16_t segments, pieces, size;
    bool closed;
    struct iovec iov[2 * RUN_SEGMENTS];
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(uint16_t))];
};

/* What the kernel refused for one outer address. */
struct path {
    uint32_t address_be;
    uint16_t mtu; /* of inner packets */
    uint64_t mtu_until, no_segment_until;
};

struct sender {
    struct pump *pump;
    struct direction *own;
    const struct table *table;
    struct cursor cursor;
    struct icmp_budget budgets[ICMP_KINDS];
    uint64_t now; /* at the beginning of the batch */
    bool nowait;  /* reads may be told not to wait */
    unsigned run_count;
    size_t headers_used;
    uint16_t last_run[LAST_RUNS]; /* hash of a peer → its latest run + 1 */
    struct path paths[PATHS];
    struct mmsghdr messages[RUNS];
    struct run runs[RUNS];
    uint8_t headers[HEADERS];
    uint8_t arena[ARENA];
    uint8_t scratch[BUFFER];
};

static struct path *path_to(struct sender *s, uint32_t address_be)
{
    const uint8_t *byte = (const uint8_t *)&address_be;
    struct path *path = &s->paths[(byte[2] * 31u + byte[3]) % PATHS];
    if (path->address_be != address_be)
        *path = (struct path){.address_be = address_be};
    return path;
}

/* ---- Dropping, and telling the sender ------------------------------------------------------------------------- */

/* `packets`: that it stands for. */
static void drop(struct sender *s, enum drop reason, uint16_t mtu, const uint8_t *packet, const struct inner *inner,
                 uint32_t packets)
{
    uint8_t answer[ICMP_MAX];
    enum icmp_kind kind = icmp_for(reason);
    count(&s->own->drops[reason], packets);
    if (kind == ICMP_NONE)
        return;
    size_t length = icmp_error(s->table, kind, mtu, packet, inner, answer);
    if (length == 0 || !icmp_allowed(&s->budgets[kind], s->now))
        return;
    if (pump_send_icmp(s->pump, answer, length))
        count(&s->own->counts[COUNT_ICMP_ERRORS], 1);
}

/* ---- One packet through a path too narrow for it --------------------------------------------------------------- */

static bool send_plain(struct sender *s, const struct sockaddr_in *to, struct iovec *iov, size_t pieces)
{
    struct msghdr message = {
        .msg_name = (void *)to, .msg_namelen = sizeof *to, .msg_iov = iov, .msg_iovlen = pieces};
    ssize_t sent;
    count(&s->own->counts[COUNT_WRITES], 1);
    int lane = pump_lane(s->pump, to->sin_addr.s_addr);
    while ((sent = sendmsg(lane, &message, MSG_DONTWAIT | MSG_NOSIGNAL)) < 0 && errno == EINTR)
        ;
    if (sent < 0)
        return false;
    count(&s->own->counts[COUNT_PACKETS], 1);
    count(&s->own->counts[COUNT_BYTES], (uint64_t)sent);
    return true;
}

static void send_fragments(struct sender *s, const struct sockaddr_in *to, const uint8_t *packet,
                           const struct inner *inner, uint16_t mtu)
{
    struct fragments fragments;
    uint8_t header[FRAGMENT_HEADER_MAX];
    struct iovec iov[2] = {{.iov_base = header}};
    count(&s->own->counts[COUNT_FRAGMENTED], 1);
    fragments_begin(&fragments, packet, inner, mtu);
    while ((iov[0].iov_len = fragments_next(&fragments, header, &iov[1])) != 0)
        if (!send_plain(s, to, iov, 2))
            count(&s->own->drops[pump_refusal(errno)], 1);
}

/* Fragments or an ICMP error for one finished packet; `mtu` 0: not known. */
static void send_narrow(struct sender *s, const struct sockaddr_in *to, const uint8_t *packet, size_t length,
                        uint16_t mtu)
{
    static const struct vnet plain = {0};
    struct inner inner;
    if (mtu == 0 || length <= mtu || packet_parse(packet, length, &inner) != DROP_NONE) {
        count(&s->own->drops[DROP_SEND_FAILED], 1);
        return;
    }
    if (packet_fit(packet, &inner, &plain, mtu) == FIT_FRAGMENTS)
        send_fragments(s, to, packet, &inner, mtu);
    else
        drop(s, DROP_TOO_BIG, mtu, packet, &inner, 1);
}

static size_t gathered(struct sender *s, const struct iovec *iov, size_t pieces)
{
    size_t length = 0;
    for (size_t i = 0; i < pieces; i++) {
        memcpy(s->scratch + length, iov[i].iov_base, iov[i].iov_len);
        length += iov[i].iov_len;
    }
    return length;
}

/* The socket refused one plain packet. */
static void plain_refused(struct sender *s, const struct sockaddr_in *to, const struct iovec *iov, size_t pieces,
                          int error)
{
    if (error != EMSGSIZE) {
        count(&s->own->drops[pump_refusal(error)], 1);
        return;
    }
    struct path *path = path_to(s, to->sin_addr.s_addr);
    uint16_t mtu = pump_path_mtu(to);
    if (mtu != 0) {
        path->mtu = mtu;
        path->mtu_until = s->now + PATH_MTU_NS;
    }
    send_narrow(s, to, s->scratch, gathered(s, iov, pieces), mtu);
}

/* ---- Runs ------------------------------------------------------------------------------------------------------ */

static bool refuses_offload(int error)
{
    return error == EIO || error == EINVAL || error == EMSGSIZE || error == EOPNOTSUPP || error == ENOPROTOOPT;
}

/* The socket refused a run: the same packets again, each by itself. */
static void run_refused(struct sender *s, struct run *run, int error)
{
    if (run->segments == 1) {
        plain_refused(s, &run->to, run->iov, run->pieces, error);
        return;
    }
    if (!refuses_offload(error)) {
        count(&s->own->drops[pump_refusal(error)], run->segments);
        return;
    }
    bool worked = false, narrow = false;
    count(&s->own->counts[COUNT_OFFLOAD_REFUSED], 1);
    for (size_t begin = 0, end; begin < run->pieces; begin = end) {
        size_t length = 0;
        for (end = begin; end < run->pieces && length < run->size; end++)
            length += run->iov[end].iov_len;
        if (send_plain(s, &run->to, run->iov + begin, end - begin)) {
            worked = true;
        } else {
            narrow |= errno == EMSGSIZE;
            plain_refused(s, &run->to, run->iov + begin, end - begin, errno);
        }
    }
    if (worked && !narrow) /* otherwise it was not the offload's fault */
        path_to(s, run->to.sin_addr.s_addr)->no_segment_until = s->now + RETRY_OFFLOAD_NS;
}

static void prepare_message(struct run *run, struct msghdr *message)
{
    *message = (struct msghdr){
        .msg_name = &run->to, .msg_namelen = sizeof run->to, .msg_iov = run->iov, .msg_iovlen = run->pieces};
    if (run->segments == 1)
        return;
    message->msg_control = run->control;
    message->msg_controllen = sizeof run->control;
    struct cmsghdr *control = CMSG_FIRSTHDR(message);
    control->cmsg_level = IPPROTO_UDP;
    control->cmsg_type = UDP_SEGMENT;
    control->cmsg_len = CMSG_LEN(sizeof run->size);
    memcpy(CMSG_DATA(control), &run->size, sizeof run->size);
}

/* Sends these runs, all of one lane. A full one costs them: as with the queues of the kernel, nobody waits. */
static void send_runs(struct sender *s, struct run *const *runs, unsigned number)
{
    unsigned done = 0;
    for (unsigned i = 0; i < number; i++)
        prepare_message(runs[i], &s->messages[i].msg_hdr);
    while (done < number) {
        int sent = sendmmsg(runs[0]->lane, s->messages + done, number - done, MSG_DONTWAIT | MSG_NOSIGNAL);
        count(&s->own->counts[COUNT_WRITES], 1);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0) {
            run_refused(s, runs[done++], errno);
            continue;
        }
        for (int i = 0; i < sent; i++, done++) {
            count(&s->own->counts[COUNT_PACKETS], runs[done]->segments);
            count(&s->own->counts[COUNT_BYTES], runs[done]->total);
        }
    }
}

/* Sends all runs. What they point to may be used again afterwards. */
static void flush(struct sender *s)
{
    struct run *runs[RUNS];
    bool taken[RUNS] = {false};
    for (unsigned first = 0; first < s->run_count; first++) {
        unsigned number = 0;
        for (unsigned i = first; i < s->run_count; i++) {
            if (taken[i] || s->runs[i].lane != s->runs[first].lane)
                continue;
            taken[i] = true;
            runs[number++] = &s->runs[i];
        }
        if (number != 0)
            send_runs(s, runs, number);
    }
    batch_goes_on(s->pump, SEND);
    s->run_count = 0;
    s->headers_used = 0;
    memset(s->last_run, 0, sizeof s->last_run);
}

/* Adds one packet, whose bytes stay in place until the flush. */
static void push(struct sender *s, uint32_t peer, struct peer to, unsigned most, const struct iovec *iov, int pieces)
{
    size_t length = iov[0].iov_len + (pieces == 2 ? iov[1].iov_len : 0);
    uint16_t *last = &s->last_run[peer % LAST_RUNS];
    struct run *run = *last == 0 ? NULL : &s->runs[*last - 1];
    if (run == NULL || run->peer != peer || run->closed || run->segments >= most || length > run->size ||
        run->total + length > RUN_BYTES) {
        run = &s->runs[s->run_count++];
        *last = (uint16_t)s->run_count;
        run->to = (struct sockaddr_in){
            .sin_family = AF_INET, .sin_addr.s_addr = to.address_be, .sin_port = to.port_be};
        run->lane = pump_lane(s->pump, to.address_be);
        run->peer = peer;
        run->size = (uint16_t)length;
        run->total = run->segments = run->pieces = 0;
    }
    for (int i = 0; i < pieces; i++)
        run->iov[run->pieces++] = iov[i];
    run->segments++;
    run->total += (uint32_t)length;
    run->closed = length < run->size;
}

static void make_room(struct sender *s)
{
    if (s->run_count == RUNS || s->headers_used + SEGMENT_HEADER_MAX > HEADERS)
        flush(s);
}

/* ---- Packets from the TUN --------------------------------------------------------------------------------------- */

/* Packets for `peer`; `most` of them leave in one send. */
struct target {
    uint32_t peer;
    struct peer to;
    unsigned most;
    uint16_t mtu; /* of its path, where that is narrow */
};

/* A copy of what is known of the path: a flush may give its place to another. */
static struct target target_of(struct sender *s, uint32_t peer)
{
    struct peer to = table_peer(s->table, peer);
    const struct path *path = path_to(s, to.address_be);
    bool share = s->pump->offloads.udp_segment && path->no_segment_until <= s->now;
    return (struct target){.peer = peer,
                           .to = to,
                           .most = share ? RUN_SEGMENTS : 1,
                           .mtu = path->mtu_until > s->now ? path->mtu : UINT16_MAX};
}

static void send_segments(struct sender *s, struct segments *segments, const struct target *target, bool narrow)
{
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_addr.s_addr = target->to.address_be, .sin_port = target->to.port_be};
    for (;;) {
        make_room(s);
        struct iovec iov[2] = {{.iov_base = s->headers + s->headers_used, .iov_len = segments->header_length}};
        if (!segments_next(segments, iov[0].iov_base, &iov[1]))
            return;
        if (narrow && iov[0].iov_len + iov[1].iov_len > target->mtu) { /* the last one may fit */
            flush(s); /* the order is kept */
            send_narrow(s, &address, s->scratch, gathered(s, iov, 2), target->mtu);
        } else {
            s->headers_used += (segments->header_length + 15u) & ~15u;
            push(s, target->peer, target->to, target->most, iov, 2);
        }
    }
}

/* Returns whether it was one small packet, which somebody may be waiting for. */
static bool take(struct sender *s, uint8_t *bytes, size_t length)
{
    struct vnet vnet;
    struct inner inner;
    struct segments segments;
    uint32_t peer = PEER_UNKNOWN;
    uint8_t *packet = bytes + sizeof vnet;
    if (length < sizeof vnet || length == BUFFER) {
        count(&s->own->drops[length == BUFFER ? DROP_TRUNCATED : DROP_TOO_SHORT], 1);
        return false;
    }
    memcpy(&vnet, bytes, sizeof vnet);
    length -= sizeof vnet;
    enum drop reason = packet_route(s->table, &s->cursor, packet, length, &inner, &peer);
    if (reason != DROP_NONE) {
        drop(s, reason, 0, packet, &inner, segments_count(packet, length, &vnet));
        return false;
    }
    struct target target = target_of(s, peer);
    enum fit fit = target.mtu != UINT16_MAX ? packet_fit(packet, &inner, &vnet, target.mtu) : FIT_WHOLE;
    if (fit == FIT_TOO_BIG) {
        drop(s, DROP_TOO_BIG, target.mtu, packet, &inner, segments_count(packet, length, &vnet));
        return false;
    }
    reason = packet_finish(packet, &inner, &vnet);
    if (reason == DROP_NONE && vnet.gso_type != VNET_GSO_NONE)
        reason = segments_begin(&segments, packet, &inner, &vnet);
    if (reason != DROP_NONE) {
        count(&s->own->drops[reason], 1);
        return false;
    }
    if (vnet.gso_type != VNET_GSO_NONE) {
        count(&s->own->counts[COUNT_SUPER_PACKETS], 1);
        send_segments(s, &segments, &target, fit == FIT_FRAGMENTS);
        return false;
    }
    struct iovec iov = {.iov_base = packet, .iov_len = length};
    make_room(s);
    if (fit == FIT_FRAGMENTS) {
        flush(s);
        iov.iov_len = gathered(s, &iov, 1);
        send_narrow(s, &(struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = target.to.address_be,
                                             .sin_port = target.to.port_be},
                    s->scratch, length, target.mtu);
    } else {
        push(s, peer, target.to, target.most, &iov, 1);
    }
    return true;
}

/* Reads a packet if there is one: its length, 0 if there is none, or -1. */
static ssize_t read_more(struct sender *s, uint8_t *bytes)
{
    struct iovec iov = {.iov_base = bytes, .iov_len = BUFFER};
    if (s->nowait) {
        ssize_t length = preadv2(s->pump->tun, &iov, 1, -1, RWF_NOWAIT);
        if (length >= 0)
            return length;
        if (errno != EOPNOTSUPP)
            return errno == EAGAIN ? 0 : -1;
        s->nowait = false; /* kernels before 5.11 */
    }
    struct pollfd ready = {.fd = s->pump->tun, .events = POLLIN};
    if (poll(&ready, 1, 0) <= 0)
        return 0;
    return read(s->pump->tun, bytes, BUFFER);
}

/* Takes what else there is, up to a limit. */
static void take_more(struct sender *s, size_t used)
{
    for (int packets = 1; packets < PACKETS; packets++) {
        if (used + BUFFER > ARENA) {
            flush(s);
            used = 0;
            if (pump_now() - s->now > BATCH_NS)
                return;
        }
        ssize_t length = read_more(s, s->arena + used);
        if (length <= 0)
            return;
        count(&s->own->counts[COUNT_READS], 1);
        take(s, s->arena + used, (size_t)length);
        used += ((size_t)length + 63) & ~(size_t)63;
    }
}

void *send_loop(void *argument)
{
    struct pump *pump = argument;
    struct sender *s = calloc(1, sizeof *s);
    if (s == NULL)
        pump_fail(pump, "no memory for the packets to be sent");
    s->pump = pump;
    s->own = &pump->ways[SEND];
    s->nowait = true;
    for (;;) {
        pump_may_read(pump, SEND);
        ssize_t length = read(pump->tun, s->arena, BUFFER);
        if (length < 0) {
            if (errno == EBADFD || errno == EBADF)
                pump_fail(pump, "the TUN device is gone");
            pump_read_failed(pump, SEND, errno);
            continue;
        }
        s->table = batch_begin(pump, SEND);
        uint64_t before = s->now;
        s->now = pump_now();
        count(&s->own->counts[COUNT_READS], 1);
        if (take(s, s->arena, (size_t)length) && s->now - before > SILENCE_NS)
            flush(s); /* its receiver may be waiting: it does not wait for others */
        take_more(s, ((size_t)length + 63) & ~(size_t)63);
        flush(s);
        batch_end(pump, SEND);
    }
    return NULL;
}
