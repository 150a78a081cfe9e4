/* Cutting packets: super-packets into segments, packets too big for their path into fragments. */
#include "packet.h"

#include "bytes.h"

/* Fields that every segment gets anew; summed without them, they are added segment by segment. */
#define FLAGS_PER_SEGMENT (TCP_FIN | TCP_PSH | TCP_CWR)

/* Walks the IPv6 extension headers that may stand before TCP and UDP in a packet that is cut. Returns where the
 * header of `protocol` begins, 0 when there is none. A routing header with segments left changes the destination the
 * pseudo header is made of, and a fragment is never cut. */
static uint32_t find_transport6(const uint8_t *packet, uint32_t length, uint8_t protocol)
{
    uint32_t at = IPV6_HEADER;
    uint8_t next = packet[IPV6_NEXT];
    while (next != protocol) {
        if (next != NEXT_HOP_BY_HOP && next != NEXT_ROUTING && next != NEXT_DESTINATION)
            return 0;
        if (at + 8 > length || (next == NEXT_ROUTING && packet[at + 3] != 0))
            return 0;
        next = packet[at];
        at += (packet[at + 1] + 1u) * 8;
    }
    return at;
}

/* Sets type, transport, header_length and count of `segments` from a super-packet. False when it is none. */
static bool find_headers(struct segments *segments, const uint8_t *packet, const struct inner *inner,
                         const struct vnet *vnet)
{
    uint8_t type = (uint8_t)(vnet->gso_type & ~VNET_GSO_ECN);
    bool udp = type == VNET_GSO_UDP_L4;
    if (!udp && type != (inner->family == 4 ? VNET_GSO_TCPV4 : VNET_GSO_TCPV6))
        return false;
    uint8_t protocol = udp ? PROTOCOL_UDP : PROTOCOL_TCP;
    uint32_t transport = inner->header_length;
    if (inner->family == 6)
        transport = find_transport6(packet, inner->length, protocol);
    else if (inner->protocol != protocol || inner->fragment)
        return false;
    if (transport == 0 || vnet->gso_size == 0 ||
        (vnet->flags & VNET_NEEDS_CSUM && vnet->csum_start != transport))
        return false;
    uint32_t header_length = transport + (udp ? UDP_HEADER : TCP_HEADER);
    if (header_length > inner->length)
        return false;
    if (!udp)
        header_length = transport + (packet[transport + TCP_DATA_OFFSET] >> 4) * 4u;
    if (header_length < transport + (udp ? UDP_HEADER : TCP_HEADER) || header_length > inner->length ||
        header_length > SEGMENT_HEADER_MAX)
        return false;
    uint32_t payload = inner->length - header_length;
    segments->count = payload ? (payload + vnet->gso_size - 1) / vnet->gso_size : 1;
    if (segments->count > (udp ? UDP_SEGMENTS_MAX : TCP_SEGMENTS_MAX))
        return false;
    segments->family = inner->family;
    segments->protocol = protocol;
    segments->transport = (uint16_t)transport;
    segments->header_length = (uint16_t)header_length;
    return true;
}

uint32_t segments_count(const uint8_t *packet, size_t length, const struct vnet *vnet)
{
    struct inner inner;
    struct segments segments;
    if (vnet->gso_type == VNET_GSO_NONE || packet_parse(packet, length, &inner) != DROP_NONE ||
        !find_headers(&segments, packet, &inner, vnet))
        return 1;
    return segments.count;
}

enum fit packet_fit(const uint8_t *packet, const struct inner *inner, const struct vnet *vnet, uint16_t mtu)
{
    uint32_t longest = inner->length;
    if (longest <= mtu)
        return FIT_WHOLE;
    if (vnet->gso_type != VNET_GSO_NONE) {
        struct segments segments;
        if (!find_headers(&segments, packet, inner, vnet))
            return FIT_WHOLE; /* segments_begin will say what is wrong */
        if ((uint32_t)segments.header_length + vnet->gso_size < longest)
            longest = (uint32_t)segments.header_length + vnet->gso_size;
        if (longest <= mtu)
            return FIT_WHOLE;
    }
    bool whole = inner->family == 6 || load_be16(packet + IPV4_FIELD) & IPV4_DF;
    return whole ? FIT_TOO_BIG : FIT_FRAGMENTS;
}

/* Sums what the segments share: both headers without the fields that differ, and the pseudo header without length. */
static void sum_shared(struct segments *segments)
{
    uint8_t header[SEGMENT_HEADER_MAX];
    uint8_t *transport = header + segments->transport;
    memcpy(header, segments->packet, segments->header_length);
    if (segments->protocol == PROTOCOL_UDP) {
        memset(transport + UDP_LENGTH, 0, 4); /* and the checksum */
    } else {
        memset(transport + TCP_SEQUENCE, 0, 4);
        memset(transport + TCP_CHECKSUM, 0, 2);
        transport[TCP_FLAGS] &= (uint8_t)~FLAGS_PER_SEGMENT;
    }
    bool ipv4 = segments->family == 4;
    const uint8_t *addresses = header + (ipv4 ? IPV4_SOURCE : IPV6_SOURCE);
    uint64_t sum = checksum_add(sum_of_be16(segments->protocol), addresses, ipv4 ? 8 : 32);
    segments->transport_sum = checksum_add(sum, transport, segments->header_length - (size_t)segments->transport);
    if (ipv4) {
        memset(header + IPV4_TOTAL_LENGTH, 0, 4); /* and the identification */
        memset(header + IPV4_CHECKSUM, 0, 2);
        segments->network_sum = checksum_add(0, header, segments->transport);
    }
}

enum drop segments_begin(struct segments *segments, const uint8_t *packet, const struct inner *inner,
                         const struct vnet *vnet)
{
    *segments = (struct segments){.packet = packet, .length = inner->length, .size = vnet->gso_size};
    if (!find_headers(segments, packet, inner, vnet))
        return DROP_OFFLOAD;
    segments->offset = segments->header_length;
    if (inner->family == 4)
        segments->id = load_be16(packet + IPV4_ID);
    if (segments->protocol == PROTOCOL_TCP) {
        segments->sequence = load_be32(packet + segments->transport + TCP_SEQUENCE);
        segments->tcp_flags = packet[segments->transport + TCP_FLAGS];
    }
    sum_shared(segments);
    return DROP_NONE;
}

static void write_network_header(struct segments *segments, uint8_t *header, uint32_t payload)
{
    uint32_t length = segments->header_length + payload;
    if (segments->family == 6) {
        store_be16(header + IPV6_PAYLOAD_LENGTH, length - IPV6_HEADER);
        return;
    }
    store_be16(header + IPV4_TOTAL_LENGTH, length);
    store_be16(header + IPV4_ID, segments->id);
    uint64_t sum = segments->network_sum + sum_of_be16(length) + sum_of_be16(segments->id);
    store_checksum(header + IPV4_CHECKSUM, checksum_fold(sum));
    segments->id++;
}

static void write_tcp_header(struct segments *segments, uint8_t *transport, uint64_t sum, uint32_t payload)
{
    uint8_t flags = segments->tcp_flags;
    if (segments->offset + payload < segments->length)
        flags &= (uint8_t)~(TCP_FIN | TCP_PSH);
    if (segments->offset > segments->header_length)
        flags &= (uint8_t)~TCP_CWR;
    transport[TCP_FLAGS] = flags;
    store_be32(transport + TCP_SEQUENCE, segments->sequence);
    sum += sum_of_be16(flags & FLAGS_PER_SEGMENT) + sum_of_be32(segments->sequence);
    store_checksum(transport + TCP_CHECKSUM, checksum_fold(sum));
    segments->sequence += payload;
}

static void write_udp_header(uint8_t *transport, uint64_t sum, uint32_t length)
{
    store_be16(transport + UDP_LENGTH, length);
    uint16_t folded = checksum_fold(sum + sum_of_be16(length));
    store_checksum(transport + UDP_CHECKSUM, folded == 0xffff ? 0 : folded); /* never 0: that means none */
}

bool segments_next(struct segments *segments, uint8_t header[SEGMENT_HEADER_MAX], struct iovec *payload)
{
    if (segments->count == 0)
        return false;
    segments->count--;
    const uint8_t *slice = segments->packet + segments->offset;
    uint32_t left = segments->length - segments->offset;
    uint32_t taken = left < segments->size ? left : segments->size;
    uint32_t transport_length = segments->header_length - (uint32_t)segments->transport + taken;
    memcpy(header, segments->packet, segments->header_length);
    write_network_header(segments, header, taken);
    uint64_t sum = checksum_add(segments->transport_sum + sum_of_be16(transport_length), slice, taken);
    uint8_t *transport = header + segments->transport;
    if (segments->protocol == PROTOCOL_TCP)
        write_tcp_header(segments, transport, sum, taken);
    else
        write_udp_header(transport, sum, transport_length);
    *payload = (struct iovec){.iov_base = (void *)(uintptr_t)slice, .iov_len = taken};
    segments->offset += taken;
    return true;
}

/* ---- Fragments -------------------------------------------------------------------------------------------------- */

void fragments_begin(struct fragments *fragments, const uint8_t *packet, const struct inner *inner, uint16_t mtu)
{
    *fragments = (struct fragments){
        .packet = packet,
        .length = inner->length,
        .offset = inner->header_length,
        .header_length = inner->header_length,
        .size = (uint16_t)((mtu - inner->header_length) & ~7),
        .field = load_be16(packet + IPV4_FIELD),
    };
}

/* net/ipv4/ip_options.c:ip_options_fragment: options without the copied bit are for the first fragment alone. */
static void blank_options(uint8_t *header, size_t length)
{
    size_t at = IPV4_HEADER;
    while (at < length && header[at] != 0) {
        if (header[at] == 1) {
            at++;
            continue;
        }
        if (at + 1 >= length || header[at + 1] < 2 || at + header[at + 1] > length)
            return;
        size_t end = at + header[at + 1];
        if (!(header[at] & 0x80))
            memset(header + at, 1, end - at);
        at = end;
    }
}

size_t fragments_next(struct fragments *fragments, uint8_t header[FRAGMENT_HEADER_MAX], struct iovec *payload)
{
    size_t header_length = fragments->header_length;
    uint32_t done = fragments->offset - fragments->header_length, left = fragments->length - fragments->offset;
    uint32_t place = (fragments->field & IPV4_OFFSET) + done / 8;
    if (left == 0 || place > IPV4_OFFSET) /* beyond what can be put together again */
        return 0;
    uint32_t taken = left < fragments->size ? left : fragments->size;
    uint32_t field = (fragments->field & ~(unsigned)IPV4_OFFSET) | place;
    if (taken < left)
        field |= IPV4_MF;
    memcpy(header, fragments->packet, header_length);
    if (done > 0)
        blank_options(header, header_length);
    store_be16(header + IPV4_TOTAL_LENGTH, (uint32_t)header_length + taken);
    store_be16(header + IPV4_FIELD, field);
    memset(header + IPV4_CHECKSUM, 0, 2);
    store_checksum(header + IPV4_CHECKSUM, checksum_fold(checksum_add(0, header, header_length)));
    *payload = (struct iovec){.iov_base = (void *)(uintptr_t)(fragments->packet + fragments->offset), .iov_len = taken};
    fragments->offset += taken;
    return header_length;
}
