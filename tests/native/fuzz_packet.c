/* Fuzz target for the pure core: broken input never reads or writes where it must not (the sanitizers watch), and what
 * the core makes of any input holds what packet.h promises (checked here).
 *
 * With clang's libFuzzer: `make fuzz TARGET=packet SECONDS=60`. With -DREPLAY it is a program that runs each file it is given once.
 * First byte of an input, from its lowest bits: what to run (2 bits); whether lengths, counts and header checksums are
 * mended before, so that what lies behind those checks is reached (1); from whom it was received (2); SourceCheck (2).
 * See tests/unit/test_udp_corpus.py for where the corpus comes from.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "packet.h"

#define CHECK(claim)                                                                                                   \
    do {                                                                                                               \
        if (!(claim)) {                                                                                                \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #claim);                                 \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* From the first byte. */
struct options {
    bool mended;
    uint32_t sender;
    enum source_check source_check;
};

static uint16_t be16(const uint8_t *bytes)
{
    return (uint16_t)(bytes[0] << 8 | bytes[1]);
}

static void le32(uint8_t *bytes, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        bytes[i] = (uint8_t)(value >> 8 * i);
}

static uint8_t *copy(const uint8_t *bytes, size_t length)
{
    uint8_t *copied = malloc(length ? length : 1);
    CHECK(copied);
    if (length > 0)
        memcpy(copied, bytes, length);
    return copied;
}

static void mend(uint8_t *packet, size_t length)
{
    if (length >= IPV4_HEADER && packet[0] >> 4 == 4) {
        size_t header_length = (packet[0] & 15u) * 4;
        packet[2] = (uint8_t)(length >> 8);
        packet[3] = (uint8_t)length;
        memset(packet + 10, 0, 2);
        uint16_t sum = checksum_fold(checksum_add(0, packet, header_length < length ? header_length : length));
        sum = (uint16_t)~sum;
        memcpy(packet + 10, &sum, 2);
    } else if (length >= IPV6_HEADER && packet[0] >> 4 == 6) {
        packet[4] = (uint8_t)((length - IPV6_HEADER) >> 8);
        packet[5] = (uint8_t)(length - IPV6_HEADER);
    }
}

static uint8_t *packet_of(const uint8_t *bytes, size_t length, bool mended)
{
    uint8_t *packet = copy(bytes, length);
    if (mended)
        mend(packet, length);
    return packet;
}

/* First and last address of fd05:0:0:N::/64. */
static void net6(uint8_t *range, uint8_t number)
{
    memcpy(range, (const uint8_t[]){0xfd, 5, 0, 0, 0, 0, 0, number}, 8);
    memset(range + 8, 0, 8);
    memcpy(range + 16, range, 8);
    memset(range + 24, 0xff, 8);
}

/* Two peers, of which the first has 10.5.2.0/24 and fd05:0:0:2::/64 and takes IPv6, the second has 10.5.3.0/24 and
 * fd05:0:0:3::/64. We have 10.5.7.0/24 and fd05:0:0:7::/64; the Networks are 10.5.0.0/16 and fd05::/48. */
static const struct table *small_table(enum source_check check)
{
    static uint8_t bytes[TABLE_HEADER + 2 * 8 + 2 * 12 + 2 * 36 + 8 + 32];
    static struct table table;
    uint8_t *ranges4 = bytes + TABLE_HEADER + 2 * 8, *ranges6 = ranges4 + 2 * 12, *networks = ranges6 + 2 * 36;
    memcpy(bytes, "FPT1", 4);
    le32(bytes + 4, sizeof bytes);
    bytes[8] = (uint8_t)check;
    bytes[9] = 3;
    bytes[10] = 0xc0;
    bytes[11] = 5; /* 1472 */
    bytes[12] = bytes[16] = bytes[20] = 2;
    bytes[24] = bytes[28] = 1;
    le32(bytes + 32, 0x0a050700);
    le32(bytes + 36, 0x0a0507ff);
    le32(bytes + 40, 0x0a050700);
    net6(bytes + 44, 7);
    memcpy(bytes + 76, bytes + 44, 16);
    for (uint8_t i = 0; i < 2; i++) {
        memcpy(bytes + TABLE_HEADER + 8 * i, (const uint8_t[]){192, 0, 2, (uint8_t)(2 + i), 0x20, 0x5d, !i, 0}, 8);
        le32(ranges4 + 12 * i, 0x0a050200 + 0x100u * i);
        le32(ranges4 + 12 * i + 4, 0x0a0502ff + 0x100u * i);
        le32(ranges4 + 12 * i + 8, i);
        net6(ranges6 + 36 * i, (uint8_t)(2 + i));
        le32(ranges6 + 36 * i + 32, i);
    }
    le32(networks, 0x0a050000);
    le32(networks + 4, 0x0a05ffff);
    net6(networks + 8, 0);
    memset(networks + 8 + 16 + 6, 0xff, 10);
    CHECK(table_open(&table, bytes, sizeof bytes) == NULL);
    return &table;
}

static bool header_right(const uint8_t *packet, const struct inner *inner)
{
    return inner->family == 6 || checksum_fold(checksum_add(0, packet, inner->header_length)) == 0xffff;
}

/* Counts that make up a length, and that length: at most 7 of each part. */
static size_t mend_table(uint8_t *bytes)
{
    static const uint8_t sizes[] = {8, 12, 36, 8, 32};
    size_t length = TABLE_HEADER;
    for (size_t part = 0; part < sizeof sizes; part++) {
        le32(bytes + 12 + 4 * part, bytes[12 + 4 * part] & 7);
        length += (size_t)sizes[part] * bytes[12 + 4 * part];
    }
    memcpy(bytes, "FPT1", 4);
    le32(bytes + 4, (uint32_t)length);
    return length;
}

/* 16 bytes to look up, and the table to look in. */
static void try_table(const uint8_t *data, size_t size, const struct options *options)
{
    struct table table;
    struct cursor cursor = {.range4 = 3, .range6 = UINT32_MAX};
    uint8_t whole[4096] = {0};
    if (size < 16 || size > sizeof whole)
        return;
    size_t length = size - 16;
    memcpy(whole, data + 16, length);
    if (options->mended)
        length = mend_table(whole);
    uint8_t *bytes = copy(whole, length);
    if (table_open(&table, bytes, length) == NULL) {
        uint32_t four = table_route4(&table, &cursor, data), six = table_route6(&table, &cursor, data);
        CHECK(four == PEER_UNKNOWN || four < table.peer_count);
        CHECK(six == PEER_UNKNOWN || six < table.peer_count);
        CHECK(four == table_route4(&table, &cursor, data) && six == table_route6(&table, &cursor, data));
        for (uint32_t i = 0; i < table.peer_count; i++)
            CHECK(table_find_peer(&table, table_peer(&table, i).address_be) == i);
        uint32_t address_be;
        memcpy(&address_be, data, 4);
        uint32_t found = table_find_peer(&table, address_be);
        CHECK(found == PEER_UNKNOWN || table_peer(&table, found).address_be == address_be);
    }
    free(bytes);
}

static void try_receive(const uint8_t *data, size_t size, const struct options *options)
{
    const struct table *table = small_table(options->source_check);
    struct cursor cursor = {0};
    struct inner inner;
    uint8_t *packet = packet_of(data, size, options->mended);
    if (packet_accept(table, &cursor, options->sender, packet, size, &inner) == DROP_NONE) {
        CHECK(header_right(packet, &inner));
        if (inner.family == 4)
            CHECK(memcmp(packet + 16, (const uint8_t[]){10, 5, 7}, 3) == 0);
        else
            CHECK(memcmp(packet + 24, table->own6_first, 8) == 0);
    }
    free(packet);
}

/* What a segment or fragment must be, put together in `whole`. */
static void check_piece(const uint8_t *whole, size_t length)
{
    struct inner inner;
    CHECK(packet_parse(whole, length, &inner) == DROP_NONE);
    CHECK(header_right(whole, &inner));
}

static void check_segments(const uint8_t *packet, const struct inner *inner, const struct vnet *vnet)
{
    static uint8_t whole[65536 + SEGMENT_HEADER_MAX];
    struct segments segments;
    struct iovec payload;
    if (segments_begin(&segments, packet, inner, vnet) != DROP_NONE)
        return;
    uint32_t count = segments.count, seen = 0;
    size_t length = segments.header_length;
    for (; segments_next(&segments, whole, &payload); seen++) {
        CHECK(payload.iov_len <= vnet->gso_size);
        CHECK((const uint8_t *)payload.iov_base == packet + length);
        memcpy(whole + segments.header_length, payload.iov_base, payload.iov_len);
        check_piece(whole, segments.header_length + payload.iov_len);
        length += payload.iov_len;
    }
    CHECK(seen == count && length == inner->length);
}

static void check_fragments(const uint8_t *packet, const struct inner *inner, uint16_t mtu)
{
    static uint8_t whole[65536];
    struct fragments fragments;
    struct iovec payload;
    size_t header_length;
    fragments_begin(&fragments, packet, inner, mtu);
    while ((header_length = fragments_next(&fragments, whole, &payload)) > 0) {
        CHECK(header_length == inner->header_length && header_length + payload.iov_len <= mtu);
        memcpy(whole + header_length, payload.iov_base, payload.iov_len);
        check_piece(whole, header_length + payload.iov_len);
    }
}

static void check_icmp(const uint8_t *packet, const struct inner *inner, uint16_t mtu)
{
    uint8_t answer[ICMP_MAX], again[ICMP_MAX];
    for (int kind = ICMP_NONE; kind <= ICMP_TOO_BIG; kind++) {
        struct inner answered;
        size_t length = icmp_error(small_table(SOURCE_NETWORK), (enum icmp_kind)kind, mtu, packet, inner, answer);
        if (length == 0)
            continue;
        CHECK(length <= (inner->family == 4 ? 576 : 1280));
        check_piece(answer, length);
        CHECK(packet_parse(answer, length, &answered) == DROP_NONE);
        CHECK(icmp_error(small_table(SOURCE_NETWORK), (enum icmp_kind)kind, mtu, answer, &answered, again) == 0);
    }
}

/* 10 bytes of vnet header, 2 of MTU, the packet. */
static void try_send(const uint8_t *data, size_t size, const struct options *options)
{
    struct cursor cursor = {0};
    struct inner inner;
    struct vnet vnet;
    uint32_t peer;
    if (size < 12)
        return;
    memcpy(&vnet, data, sizeof vnet);
    uint16_t mtu = be16(data + 10);
    mtu = mtu < 68 ? 68 : mtu;
    uint8_t *packet = packet_of(data + 12, size - 12, options->mended);
    enum drop reason = packet_route(small_table(SOURCE_NETWORK), &cursor, packet, size - 12, &inner, &peer);
    if (reason == DROP_NONE || icmp_for(reason) != ICMP_NONE)
        check_icmp(packet, &inner, mtu);
    if (reason == DROP_NONE) {
        enum fit fit = packet_fit(packet, &inner, &vnet, mtu);
        bool right = header_right(packet, &inner);
        if (packet_finish(packet, &inner, &vnet) == DROP_NONE) {
            CHECK(header_right(packet, &inner) == right);
            if (vnet.gso_type != VNET_GSO_NONE)
                check_segments(packet, &inner, &vnet);
            else if (fit == FIT_FRAGMENTS)
                check_fragments(packet, &inner, mtu);
        }
    }
    free(packet);
}

/* Cuts what was joined, and compares with what came. */
static void check_cut(const struct joiner *joiner, size_t entry)
{
    static uint8_t super[65536], whole[65536];
    struct vnet vnet;
    uint8_t header[JOIN_HEADER_MAX];
    struct iovec slices[JOIN_SEGMENTS + 2], parts[JOIN_SEGMENTS], payload;
    struct inner inner;
    struct segments segments;
    size_t count = join_write(joiner, entry, &vnet, header, slices), length = 0;
    size_t packets = join_split(joiner, entry, parts);
    if (packets == 1)
        return;
    for (size_t i = 1; i < count; i++) {
        CHECK(slices[i].iov_len <= sizeof super - length);
        memcpy(super + length, slices[i].iov_base, slices[i].iov_len);
        length += slices[i].iov_len;
    }
    CHECK(packet_parse(super, length, &inner) == DROP_NONE);
    CHECK(segments_begin(&segments, super, &inner, &vnet) == DROP_NONE);
    CHECK(segments.count == packets);
    for (size_t i = 0; segments_next(&segments, whole, &payload); i++) {
        uint8_t came[65536];
        memcpy(whole + segments.header_length, payload.iov_base, payload.iov_len);
        CHECK(parts[i].iov_len == segments.header_length + payload.iov_len);
        memcpy(came, parts[i].iov_base, parts[i].iov_len);
        if (inner.family == 4) {
            memcpy(came + 10, whole + 10, 2); /* the checksum was packet_accept's business */
            if (came[6] & 0x40)
                memcpy(came + 4, whole + 4, 2); /* RFC 6864 */
        }
        size_t at = inner.header_length + (size_t)vnet.csum_offset;
        if (memcmp(came + at, "\xff\xff", 2) == 0 || memcmp(whole + at, "\xff\xff", 2) == 0) {
            memset(came + at, 0, 2); /* 0 and 0xffff are one number */
            memset(whole + at, 0, 2);
        }
        CHECK(memcmp(came, whole, parts[i].iov_len) == 0);
    }
}

/* Packets, each with two bytes of length. */
static void try_join(const uint8_t *data, size_t size, const struct options *options)
{
    static struct joiner joiner;
    static uint8_t *packets[JOIN_PIECES];
    size_t count = 0, split = 0;
    join_reset(&joiner, JOIN_TCP | JOIN_UDP);
    while (size >= 2 && count < JOIN_PIECES) {
        struct inner inner;
        size_t length = be16(data);
        data += 2;
        size -= 2;
        if (length > size)
            length = size;
        uint8_t *packet = packet_of(data, length, options->mended);
        data += length;
        size -= length;
        if (packet_parse(packet, length, &inner) != DROP_NONE || !join_add(&joiner, packet, &inner))
            free(packet);
        else
            packets[count++] = packet;
    }
    for (size_t i = 0; i < joiner.count; i++) {
        struct iovec parts[JOIN_SEGMENTS];
        split += join_split(&joiner, i, parts);
        check_cut(&joiner, i);
    }
    CHECK(split == count);
    while (count > 0)
        free(packets[--count]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const attempts[])(const uint8_t *, size_t, const struct options *) = {try_table, try_receive,
                                                                                       try_send, try_join};
    static const uint32_t senders[] = {0, 1, PEER_UNKNOWN, 0};
    static const enum source_check checks[] = {SOURCE_NETWORK, SOURCE_STRICT, SOURCE_ANY, SOURCE_NETWORK};
    if (size > 0)
        attempts[data[0] & 3](data + 1, size - 1,
                              &(struct options){.mended = data[0] & 4,
                                                .sender = senders[data[0] >> 3 & 3],
                                                .source_check = checks[data[0] >> 5 & 3]});
    return 0;
}

#ifdef REPLAY
int main(int argc, char **argv)
{
    static uint8_t data[1 << 20];
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        CHECK(file);
        size_t size = fread(data, 1, sizeof data, file);
        fclose(file);
        LLVMFuzzerTestOneInput(data, size);
    }
    printf("%d\n", argc - 1);
    return 0;
}
#endif
