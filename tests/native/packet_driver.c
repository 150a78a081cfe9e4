/* Runs the pure core for the tests: requests on stdin, answers on stdout, each a little-endian 32-bit length and that
 * many bytes. The first byte of a request says what to run. Every packet and table is copied to memory of exactly its
 * size, so that a sanitizer sees each byte that is read beyond it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "packet.h"

#define CAPACITY (1u << 24)
#define UNPARSED 255

static uint8_t *request, *answer;
static size_t answered;
static uint8_t *table_bytes;
static struct table table;

static uint32_t number(const uint8_t *bytes)
{
    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

static void put(const void *bytes, size_t length)
{
    if (length > CAPACITY - answered)
        abort();
    if (length > 0)
        memcpy(answer + answered, bytes, length);
    answered += length;
}

static void put_number(uint32_t value)
{
    uint8_t bytes[4] = {(uint8_t)value, (uint8_t)(value >> 8), (uint8_t)(value >> 16), (uint8_t)(value >> 24)};
    put(bytes, 4);
}

static void put_byte(unsigned value)
{
    uint8_t byte = (uint8_t)value;
    put(&byte, 1);
}

static uint8_t *copy(const uint8_t *bytes, size_t length)
{
    uint8_t *copied = malloc(length ? length : 1);
    if (!copied)
        abort();
    if (length > 0)
        memcpy(copied, bytes, length);
    return copied;
}

static void put_slices(const struct iovec *slices, size_t count)
{
    size_t length = 0;
    for (size_t i = 0; i < count; i++)
        length += slices[i].iov_len;
    put_number((uint32_t)length);
    for (size_t i = 0; i < count; i++)
        put(slices[i].iov_base, slices[i].iov_len);
}

/* t TABLE → what is wrong with it */
static void run_table(const uint8_t *bytes, size_t length)
{
    uint8_t *copied = copy(bytes, length);
    struct table opened;
    const char *wrong = table_open(&opened, copied, length);
    if (wrong) {
        put(wrong, strlen(wrong));
        free(copied);
        return;
    }
    free(table_bytes);
    table_bytes = copied;
    table = opened;
}

/* a SENDER PACKET → reason */
static void run_accept(const uint8_t *bytes, size_t length)
{
    static struct cursor cursor;
    struct inner inner;
    uint8_t *packet = copy(bytes + 4, length - 4);
    put_byte(packet_accept(&table, &cursor, number(bytes), packet, length - 4, &inner));
    free(packet);
}

/* r PACKET → reason, peer */
static void run_route(const uint8_t *bytes, size_t length)
{
    static struct cursor cursor;
    struct inner inner;
    uint32_t peer = PEER_UNKNOWN;
    uint8_t *packet = copy(bytes, length);
    put_byte(packet_route(&table, &cursor, packet, length, &inner, &peer));
    put_number(peer);
    free(packet);
}

/* f MTU VNET PACKET → enum fit */
static void run_fit(const uint8_t *bytes, size_t length)
{
    struct inner inner;
    struct vnet vnet;
    memcpy(&vnet, bytes + 4, sizeof vnet);
    uint8_t *packet = copy(bytes + 14, length - 14);
    if (packet_parse(packet, length - 14, &inner) == DROP_NONE)
        put_byte(packet_fit(packet, &inner, &vnet, (uint16_t)number(bytes)));
    else
        put_byte(UNPARSED);
    free(packet);
}

/* s VNET PACKET → reason, packets to send */
static void run_send(const uint8_t *bytes, size_t length)
{
    struct inner inner;
    struct vnet vnet;
    struct segments segments;
    uint8_t header[SEGMENT_HEADER_MAX];
    struct iovec slices[2] = {{.iov_base = header}, {0}};
    memcpy(&vnet, bytes, sizeof vnet);
    length -= sizeof vnet;
    uint8_t *packet = copy(bytes + sizeof vnet, length);
    enum drop reason = packet_parse(packet, length, &inner);
    if (reason == DROP_NONE)
        reason = packet_finish(packet, &inner, &vnet);
    if (reason == DROP_NONE && vnet.gso_type != VNET_GSO_NONE)
        reason = segments_begin(&segments, packet, &inner, &vnet);
    put_byte(reason);
    if (reason == DROP_NONE && vnet.gso_type != VNET_GSO_NONE) {
        slices[0].iov_len = segments.header_length;
        while (segments_next(&segments, header, &slices[1]))
            put_slices(slices, 2);
    } else if (reason == DROP_NONE) {
        put_slices(&(struct iovec){packet, length}, 1);
    }
    free(packet);
}

/* g MTU PACKET → fragments */
static void run_fragments(const uint8_t *bytes, size_t length)
{
    struct inner inner;
    struct fragments fragments;
    uint8_t header[FRAGMENT_HEADER_MAX];
    struct iovec slices[2] = {{.iov_base = header}, {0}};
    uint8_t *packet = copy(bytes + 4, length - 4);
    if (packet_parse(packet, length - 4, &inner) == DROP_NONE && inner.family == 4) {
        fragments_begin(&fragments, packet, &inner, (uint16_t)number(bytes));
        while ((slices[0].iov_len = fragments_next(&fragments, header, &slices[1])) > 0)
            put_slices(slices, 2);
    }
    free(packet);
}

/* i KIND MTU PACKET → ICMP packet */
static void run_icmp(const uint8_t *bytes, size_t length)
{
    struct inner inner;
    uint8_t written[ICMP_MAX];
    uint8_t *packet = copy(bytes + 5, length - 5);
    if (packet_parse(packet, length - 5, &inner) == DROP_NONE)
        put(written, icmp_error(&table, bytes[0], (uint16_t)number(bytes + 1), packet, &inner, written));
    free(packet);
}

/* j ALLOWED (LENGTH PACKET)… → for each entry: vnet and packet, then its packets, a length 0 */
static void run_join(const uint8_t *bytes, size_t length)
{
    static struct joiner joiner;
    static uint8_t *packets[JOIN_PIECES];
    size_t count = 0;
    join_reset(&joiner, bytes[0]);
    bool takes = true;
    for (size_t at = 1; takes && at < length && count < JOIN_PIECES; count++) {
        struct inner inner;
        uint32_t size = number(bytes + at);
        packets[count] = copy(bytes + at + 4, size);
        at += 4 + size;
        if (packet_parse(packets[count], size, &inner) == DROP_NONE)
            takes = join_add(&joiner, packets[count], &inner);
    }
    for (size_t i = 0; i < joiner.count; i++) {
        struct vnet vnet;
        uint8_t header[JOIN_HEADER_MAX];
        struct iovec slices[JOIN_SEGMENTS + 2];
        put_slices(slices, join_write(&joiner, i, &vnet, header, slices));
        size_t parts = join_split(&joiner, i, slices);
        for (size_t part = 0; part < parts; part++)
            put_slices(slices + part, 1);
        put_number(0);
    }
    for (size_t i = 0; i < count; i++)
        free(packets[i]);
}

/* b NANOSECONDS… (64 bits each) → one byte each */
static void run_budget(const uint8_t *bytes, size_t length)
{
    struct icmp_budget budget = {0};
    for (size_t at = 0; at + 8 <= length; at += 8)
        put_byte(icmp_allowed(&budget, number(bytes + at) | (uint64_t)number(bytes + at + 4) << 32));
}

/* p ADDRESS → index, address, port, flags as in struct peer */
static void run_find_peer(const uint8_t *bytes)
{
    uint32_t address_be;
    memcpy(&address_be, bytes, 4);
    uint32_t index = table_find_peer(&table, address_be);
    put_number(index);
    if (index != PEER_UNKNOWN) {
        struct peer peer = table_peer(&table, index);
        put(&peer.address_be, 4);
        put(&peer.port_be, 2);
        put_number(peer.flags);
    }
}

/* c SKIP BYTES → checksum of what follows SKIP bytes */
static void run_checksum(const uint8_t *bytes, size_t length)
{
    size_t skip = bytes[0];
    uint8_t *copied = copy(bytes + 1, length - 1);
    uint16_t folded = checksum_fold(checksum_add(0, copied + skip, length - 1 - skip));
    put(&folded, 2);
    free(copied);
}

static void run(uint8_t what, const uint8_t *bytes, size_t length)
{
    switch (what) {
    case 't': run_table(bytes, length); break;
    case 'a': run_accept(bytes, length); break;
    case 'r': run_route(bytes, length); break;
    case 'f': run_fit(bytes, length); break;
    case 's': run_send(bytes, length); break;
    case 'g': run_fragments(bytes, length); break;
    case 'i': run_icmp(bytes, length); break;
    case 'j': run_join(bytes, length); break;
    case 'b': run_budget(bytes, length); break;
    case 'p': run_find_peer(bytes); break;
    case 'c': run_checksum(bytes, length); break;
    case 'n':
        for (size_t i = 0; i < DROPS; i++) {
            put(drop_names[i], strlen(drop_names[i]));
            put("\n", 1);
        }
        break;
    default: abort();
    }
}

int main(void)
{
    uint8_t length[4];
    request = malloc(CAPACITY);
    answer = malloc(CAPACITY);
    if (!request || !answer)
        return 1;
    while (fread(length, 4, 1, stdin) == 1) {
        size_t size = number(length);
        if (size == 0 || size > CAPACITY || fread(request, size, 1, stdin) != 1)
            return 1;
        answered = 0;
        run(request[0], request + 1, size - 1);
        uint8_t head[4] = {(uint8_t)answered, (uint8_t)(answered >> 8), (uint8_t)(answered >> 16), 0};
        fwrite(head, 4, 1, stdout);
        fwrite(answer, answered, 1, stdout);
        fflush(stdout);
    }
    free(request);
    free(answer);
    free(table_bytes);
    return 0;
}
