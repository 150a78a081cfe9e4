/* One packet: checksums, the checks of both directions, TTL. packet.h says what each function promises. */
#include "packet.h"

#include "bytes.h"

const char *const drop_names[DROPS] = {
#define X(symbol, name) [symbol] = name,
    DROP_REASONS(X)
#undef X
};

/* ---- Checksums -------------------------------------------------------------------------------------------------- */

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(memory_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#endif
/* The choice is made by an ifunc, which glibc has and musl has not; it runs before a sanitizer is set up. clang 14
 * gives it a name that other files do not find. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute) && !defined(SANITIZED) && !defined(__clang__)
#if __has_attribute(target_clones)
#define FOR_WIDE_VECTORS __attribute__((target_clones("avx2", "default")))
#endif
#endif
#ifndef FOR_WIDE_VECTORS
#define FOR_WIDE_VECTORS
#endif

/* One's complement addition does not mind how wide the words are (RFC 1071 2): 64 bits are taken at once, their
 * halves summed in 64 bits, which do not overflow below 2^32 words; compilers make vectors of it. */
FOR_WIDE_VECTORS
uint64_t checksum_add(uint64_t sum, const uint8_t *bytes, size_t length)
{
    size_t words = length / 8;
    uint64_t low = 0, high = 0;
    for (size_t i = 0; i < words; i++) {
        uint64_t word;
        memcpy(&word, bytes + 8 * i, 8);
        low += word & 0xffffffff;
        high += word >> 32;
    }
    uint8_t rest[8] = {0};
    uint32_t halves[2];
    memcpy(rest, bytes + 8 * words, length % 8);
    memcpy(halves, rest, 8);
    return sum + low + high + halves[0] + halves[1];
}

uint16_t checksum_fold(uint64_t sum)
{
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)((sum & 0xffff) + (sum >> 16));
}

/* An IP header without options, where a call would cost more than the sum. */
static inline uint64_t sum_plain_header(const uint8_t *header)
{
    uint32_t words[IPV4_HEADER / 4];
    memcpy(words, header, IPV4_HEADER);
    return (uint64_t)words[0] + words[1] + words[2] + words[3] + words[4];
}

/* ---- Checks ----------------------------------------------------------------------------------------------------- */

static enum drop parse4(const uint8_t *packet, size_t length, struct inner *inner)
{
    unsigned header_length = (packet[0] & 15u) * 4;
    if (header_length < IPV4_HEADER || header_length > length)
        return DROP_HEADER_LENGTH;
    if (load_be16(packet + IPV4_TOTAL_LENGTH) != length)
        return DROP_TOTAL_LENGTH;
    *inner = (struct inner){
        .length = (uint32_t)length,
        .header_length = (uint16_t)header_length,
        .family = 4,
        .protocol = packet[IPV4_PROTOCOL],
        .fragment = (load_be16(packet + IPV4_FIELD) & (IPV4_MF | IPV4_OFFSET)) != 0,
    };
    return DROP_NONE;
}

static enum drop parse6(const uint8_t *packet, size_t length, struct inner *inner)
{
    if (length < IPV6_HEADER)
        return DROP_TOO_SHORT;
    if (load_be16(packet + IPV6_PAYLOAD_LENGTH) + (size_t)IPV6_HEADER != length)
        return DROP_TOTAL_LENGTH;
    *inner = (struct inner){
        .length = (uint32_t)length,
        .header_length = IPV6_HEADER,
        .family = 6,
        .protocol = packet[IPV6_NEXT],
    };
    return DROP_NONE;
}

enum drop packet_parse(const uint8_t *packet, size_t length, struct inner *inner)
{
    if (length < IPV4_HEADER)
        return DROP_TOO_SHORT;
    switch (packet[0] >> 4) {
    case 4:
        return parse4(packet, length, inner);
    case 6:
        return parse6(packet, length, inner);
    default:
        return DROP_VERSION;
    }
}

static bool header_checksum_right(const uint8_t *packet, const struct inner *inner)
{
    uint64_t sum = sum_plain_header(packet);
    if (inner->header_length > IPV4_HEADER)
        sum = checksum_add(sum, packet + IPV4_HEADER, inner->header_length - IPV4_HEADER);
    return checksum_fold(sum) == 0xffff;
}

static bool destination_is_ours(const struct table *table, const uint8_t *packet, uint8_t family)
{
    if (family == 4) {
        uint32_t address = load_be32(packet + IPV4_DESTINATION);
        return table->has4 && table->own4_first <= address && address <= table->own4_last;
    }
    const uint8_t *address = packet + IPV6_DESTINATION;
    return table->has6 && memcmp(table->own6_first, address, 16) <= 0 && memcmp(address, table->own6_last, 16) <= 0;
}

static bool in_networks(const struct table *table, const uint8_t *address, uint8_t family)
{
    if (family == 4) {
        uint32_t number = load_be32(address);
        for (uint32_t i = 0; i < table->network4_count; i++) {
            const uint8_t *network = table->networks4 + (size_t)8 * i;
            if (load_le32(network) <= number && number <= load_le32(network + 4))
                return true;
        }
        return false;
    }
    for (uint32_t i = 0; i < table->network6_count; i++) {
        const uint8_t *network = table->networks6 + (size_t)32 * i;
        if (memcmp(network, address, 16) <= 0 && memcmp(address, network + 16, 16) <= 0)
            return true;
    }
    return false;
}

static bool source_allowed(const struct table *table, struct cursor *cursor, uint32_t sender, const uint8_t *packet,
                           uint8_t family)
{
    if (table->source_check == SOURCE_ANY)
        return true;
    const uint8_t *source = packet + (family == 4 ? IPV4_SOURCE : IPV6_SOURCE);
    uint32_t owner = family == 4 ? table_route4(table, cursor, source) : table_route6(table, cursor, source);
    if (owner == sender)
        return true;
    return table->source_check == SOURCE_NETWORK && !in_networks(table, source, family);
}

enum drop packet_accept(const struct table *table, struct cursor *cursor, uint32_t sender, const uint8_t *packet,
                        size_t length, struct inner *inner)
{
    enum drop wrong = packet_parse(packet, length, inner);
    if (wrong != DROP_NONE)
        return wrong;
    if (inner->family == 4 && !header_checksum_right(packet, inner))
        return DROP_HEADER_CHECKSUM;
    if (packet[inner->family == 4 ? IPV4_TTL : IPV6_HOP_LIMIT] == 0)
        return DROP_TTL_ZERO;
    if (sender == PEER_UNKNOWN)
        return DROP_OUTER_SOURCE;
    if (!destination_is_ours(table, packet, inner->family))
        return DROP_INNER_DESTINATION;
    if (!source_allowed(table, cursor, sender, packet, inner->family))
        return DROP_INNER_SOURCE;
    if (inner->family == 6 && !(table_peer(table, sender).flags & PEER_IPV6))
        return DROP_IPV6_NOT_AGREED;
    return DROP_NONE;
}

enum drop packet_route(const struct table *table, struct cursor *cursor, const uint8_t *packet, size_t length,
                       struct inner *inner, uint32_t *peer)
{
    enum drop wrong = packet_parse(packet, length, inner);
    if (wrong != DROP_NONE)
        return wrong;
    uint32_t found = inner->family == 4 ? table_route4(table, cursor, packet + IPV4_DESTINATION)
                                        : table_route6(table, cursor, packet + IPV6_DESTINATION);
    if (found == PEER_UNKNOWN)
        return DROP_NO_ROUTE;
    *peer = found;
    if (inner->family == 6 && !(table_peer(table, found).flags & PEER_IPV6))
        return DROP_IPV6_NOT_AGREED;
    if (packet[inner->family == 4 ? IPV4_TTL : IPV6_HOP_LIMIT] <= 1)
        return DROP_TTL_EXCEEDED;
    return DROP_NONE;
}

/* ---- Our hop ---------------------------------------------------------------------------------------------------- */

/* RFC 1624, equation 3: HC' = ~(~HC + ~m + m'), where m' = m - 0x0100, so ~m + m' is 0xfeff whatever m is. */
static void decrement_ttl(uint8_t *packet)
{
    uint32_t sum = (uint16_t)~load_be16(packet + IPV4_CHECKSUM) + 0xfeffu;
    sum = (sum & 0xffff) + (sum >> 16);
    store_be16(packet + IPV4_CHECKSUM, ~sum);
    packet[IPV4_TTL]--;
}

/* net/core/dev.c:skb_checksum_help. A sum of 0 is written as 0xffff for every protocol: to UDP 0 means that there
 * is no checksum, to others both mean the same. */
static void finish_checksum(uint8_t *packet, uint32_t length, const struct vnet *vnet)
{
    uint8_t *start = packet + vnet->csum_start;
    uint16_t sum = checksum_fold(checksum_add(0, start, length - vnet->csum_start));
    store_checksum(start + vnet->csum_offset, sum == 0xffff ? 0 : sum);
}

enum drop packet_finish(uint8_t *packet, const struct inner *inner, const struct vnet *vnet)
{
    if (vnet->gso_type == VNET_GSO_NONE && vnet->flags & VNET_NEEDS_CSUM) {
        if (vnet->csum_start < inner->header_length ||
            (uint32_t)vnet->csum_start + vnet->csum_offset + 2 > inner->length)
            return DROP_OFFLOAD;
        finish_checksum(packet, inner->length, vnet);
    }
    if (inner->family == 4)
        decrement_ttl(packet);
    else
        packet[IPV6_HOP_LIMIT]--;
    return DROP_NONE;
}
