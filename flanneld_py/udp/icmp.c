/* ICMP errors about packets we cannot carry. */
#include "packet.h"

#include "bytes.h"

#define ICMP_HEADER 8
#define ICMP4_MAX 576 /* RFC 1812 4.3.2.3 */
#define ICMP6_MAX 1280
#define TTL 64
#define TOS 0xc0 /* internetwork control: RFC 1812 4.3.2.5 */
#define TOKENS_MAX UINT64_C(1000000000)
#define TOKEN (TOKENS_MAX / 100)

enum icmp_kind icmp_for(enum drop reason)
{
    switch (reason) {
    case DROP_NO_ROUTE:
        return ICMP_NO_ROUTE;
    case DROP_TTL_EXCEEDED:
        return ICMP_TIME_EXCEEDED;
    case DROP_TOO_BIG:
        return ICMP_TOO_BIG;
    default:
        return ICMP_NONE;
    }
}

bool icmp_allowed(struct icmp_budget *budget, uint64_t now)
{
    if (now > budget->last) {
        uint64_t passed = now - budget->last;
        budget->credit = passed < TOKENS_MAX - budget->credit ? budget->credit + passed : TOKENS_MAX;
        budget->last = now;
    }
    if (budget->credit < TOKEN)
        return false;
    budget->credit -= TOKEN;
    return true;
}

/* One host, to whom an answer can go: RFC 1122 3.2.2 excludes 0.0.0.0/8, loopback, multicast, class E, broadcast. */
static bool is_one_host4(const uint8_t *address)
{
    return address[0] != 0 && address[0] != 127 && address[0] < 224;
}

static bool is_one_host6(const uint8_t *address)
{
    static const uint8_t zeroes[15];
    if (address[0] == 0xff)
        return false;
    return memcmp(address, zeroes, 15) != 0 || address[15] > 1; /* neither :: nor ::1 */
}

static bool may_answer4(const uint8_t *packet, const struct inner *inner)
{
    if (!is_one_host4(packet + IPV4_SOURCE) || packet[IPV4_DESTINATION] >= 224)
        return false;
    if (load_be16(packet + IPV4_FIELD) & IPV4_OFFSET)
        return false;
    if (inner->protocol != PROTOCOL_ICMP)
        return true;
    if (inner->length == inner->header_length)
        return false;
    switch (packet[inner->header_length]) {
    case 3:  /* destination unreachable */
    case 4:  /* source quench */
    case 5:  /* redirect */
    case 11: /* time exceeded */
    case 12: /* parameter problem */
        return false;
    default:
        return true;
    }
}

/* Where the chain of extension headers says ICMPv6 is: its type decides. A chain that is cut off hides it, and a
 * later fragment has none. RFC 4443 2.4 (e). */
static bool may_answer6(const uint8_t *packet, const struct inner *inner, enum icmp_kind kind)
{
    if (!is_one_host6(packet + IPV6_SOURCE) || (packet[IPV6_DESTINATION] == 0xff && kind != ICMP_TOO_BIG))
        return false;
    uint32_t at = IPV6_HEADER, length = inner->length;
    uint8_t next = packet[IPV6_NEXT];
    while (next == NEXT_HOP_BY_HOP || next == NEXT_ROUTING || next == NEXT_FRAGMENT || next == NEXT_DESTINATION ||
           next == NEXT_AUTHENTICATION || next == NEXT_MOBILITY) {
        if (at + 8 > length)
            return false;
        uint32_t size = (packet[at + 1] + 1u) * 8;
        if (next == NEXT_FRAGMENT) {
            if (load_be16(packet + at + 2) & ~7u)
                return false;
            size = 8;
        } else if (next == NEXT_AUTHENTICATION) {
            size = (packet[at + 1] + 2u) * 4; /* RFC 4302 2.2 */
        }
        next = packet[at];
        at += size;
    }
    if (next != PROTOCOL_ICMPV6)
        return true;
    return at < length && packet[at] >= 128 && packet[at] != 137; /* neither an error nor a redirect */
}

static size_t write_icmp4(const struct table *table, enum icmp_kind kind, uint16_t mtu, const uint8_t *packet,
                          const struct inner *inner, uint8_t *answer)
{
    size_t quoted = ICMP4_MAX - IPV4_HEADER - ICMP_HEADER;
    if (inner->length < quoted)
        quoted = inner->length;
    size_t length = IPV4_HEADER + ICMP_HEADER + quoted;
    uint8_t *icmp = answer + IPV4_HEADER;
    memset(answer, 0, IPV4_HEADER + ICMP_HEADER);
    answer[0] = 0x45;
    answer[IPV4_TOS] = TOS;
    store_be16(answer + IPV4_TOTAL_LENGTH, (uint32_t)length);
    store_be16(answer + IPV4_FIELD, IPV4_DF); /* so that its identification may be 0: RFC 6864 */
    answer[IPV4_TTL] = TTL;
    answer[IPV4_PROTOCOL] = PROTOCOL_ICMP;
    store_be32(answer + IPV4_SOURCE, table->address4);
    memcpy(answer + IPV4_DESTINATION, packet + IPV4_SOURCE, 4);
    store_checksum(answer + IPV4_CHECKSUM, checksum_fold(checksum_add(0, answer, IPV4_HEADER)));
    icmp[0] = kind == ICMP_TIME_EXCEEDED ? 11 : 3;
    if (kind == ICMP_TOO_BIG) {
        icmp[1] = 4;
        store_be16(icmp + 6, mtu);
    }
    memcpy(icmp + ICMP_HEADER, packet, quoted);
    store_checksum(icmp + 2, checksum_fold(checksum_add(0, icmp, ICMP_HEADER + quoted)));
    return length;
}

static size_t write_icmp6(const struct table *table, enum icmp_kind kind, uint16_t mtu, const uint8_t *packet,
                          const struct inner *inner, uint8_t *answer)
{
    size_t quoted = ICMP6_MAX - IPV6_HEADER - ICMP_HEADER;
    if (inner->length < quoted)
        quoted = inner->length;
    size_t length = IPV6_HEADER + ICMP_HEADER + quoted;
    uint8_t *icmp = answer + IPV6_HEADER;
    memset(answer, 0, IPV6_HEADER + ICMP_HEADER);
    answer[0] = 0x60;
    store_be16(answer + IPV6_PAYLOAD_LENGTH, (uint32_t)length - IPV6_HEADER);
    answer[IPV6_NEXT] = PROTOCOL_ICMPV6;
    answer[IPV6_HOP_LIMIT] = TTL;
    memcpy(answer + IPV6_SOURCE, table->address6, 16);
    memcpy(answer + IPV6_DESTINATION, packet + IPV6_SOURCE, 16);
    icmp[0] = kind == ICMP_TOO_BIG ? 2 : kind == ICMP_TIME_EXCEEDED ? 3 : 1;
    if (kind == ICMP_TOO_BIG)
        store_be32(icmp + 4, mtu < 1280 ? 1280 : mtu);
    memcpy(icmp + ICMP_HEADER, packet, quoted);
    uint64_t pseudo = sum_of_be16(PROTOCOL_ICMPV6) + sum_of_be16((uint32_t)length - IPV6_HEADER);
    pseudo = checksum_add(pseudo, answer + IPV6_SOURCE, 32);
    store_checksum(icmp + 2, checksum_fold(checksum_add(pseudo, icmp, ICMP_HEADER + quoted)));
    return length;
}

size_t icmp_error(const struct table *table, enum icmp_kind kind, uint16_t mtu, const uint8_t *packet,
                  const struct inner *inner, uint8_t answer[ICMP_MAX])
{
    if (kind == ICMP_NONE)
        return 0;
    if (inner->family == 4)
        return table->has4 && may_answer4(packet, inner) ? write_icmp4(table, kind, mtu, packet, inner, answer) : 0;
    return table->has6 && may_answer6(packet, inner, kind) ? write_icmp6(table, kind, mtu, packet, inner, answer) : 0;
}
