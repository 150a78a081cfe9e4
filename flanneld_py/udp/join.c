/* Joining the packets of a batch into super-packets; packet.h says when two may be joined. */
#include "packet.h"

#include "bytes.h"

#define UNJOINED 0xffff /* a slot no packet of a flow has */
_Static_assert(JOIN_SLOTS == 1 << 6, "slot_of takes 6 bits");

/* What a packet is to the joiner. */
struct candidate {
    uint16_t slot;          /* of its flow; UNJOINED: of none that is joined */
    uint16_t header_length; /* all headers; 0: it travels alone */
    uint16_t payload;
    uint8_t tcp_flags;
};

void join_reset(struct joiner *joiner, unsigned allowed)
{
    joiner->count = joiner->pieces = 0;
    joiner->allowed = allowed;
    memset(joiner->slots, 0, sizeof joiner->slots);
}

static uint64_t load_be64(const uint8_t *p)
{
    return (uint64_t)load_be32(p) << 32 | load_be32(p + 4);
}

/* Multiplicative hashing (Knuth 6.4), twice: addresses, then all. */
static uint16_t slot_of(const uint8_t *packet, const struct inner *inner, const uint8_t *ports)
{
    const uint64_t golden = UINT64_C(0x9e3779b97f4a7c15);
    uint64_t addresses;
    if (inner->family == 4)
        addresses = load_be64(packet + IPV4_SOURCE);
    else
        addresses = load_be64(packet + IPV6_SOURCE) + load_be64(packet + IPV6_SOURCE + 8) * 3 +
                    load_be64(packet + IPV6_DESTINATION) * 5 + load_be64(packet + IPV6_DESTINATION + 8) * 7;
    uint64_t rest = load_be32(ports) ^ (uint64_t)inner->protocol << 32;
    return (uint16_t)((((addresses * golden) ^ rest) * golden) >> 58);
}

static void look_at_tcp(struct candidate *candidate, const uint8_t *packet, const struct inner *inner)
{
    const uint8_t *tcp = packet + inner->header_length;
    uint32_t header_length = inner->header_length + (tcp[TCP_DATA_OFFSET] >> 4) * 4u;
    if (header_length < inner->header_length + (uint32_t)TCP_HEADER || header_length >= inner->length)
        return;
    if ((tcp[TCP_FLAGS] & ~(TCP_PSH | TCP_FIN)) != TCP_ACK_FLAG)
        return;
    candidate->header_length = (uint16_t)header_length;
    candidate->payload = (uint16_t)(inner->length - header_length);
    candidate->tcp_flags = tcp[TCP_FLAGS];
}

static void look_at_udp(struct candidate *candidate, const uint8_t *packet, const struct inner *inner)
{
    const uint8_t *udp = packet + inner->header_length;
    uint32_t length = inner->length - inner->header_length;
    if (load_be16(udp + UDP_LENGTH) != length || length == UDP_HEADER || load_be16(udp + UDP_CHECKSUM) == 0)
        return;
    candidate->header_length = inner->header_length + UDP_HEADER;
    candidate->payload = (uint16_t)(length - UDP_HEADER);
}

/* Neither options nor fragments, nor the reserved bit: headers a super-packet can stand for. */
static bool has_plain_header(const uint8_t *packet, const struct inner *inner)
{
    return inner->family == 6 ||
           (inner->header_length == IPV4_HEADER && (load_be16(packet + IPV4_FIELD) & ~IPV4_DF) == 0);
}

/* True for packets that may belong to any flow: their ports cannot be seen. */
static bool hides_ports(const struct inner *inner)
{
    if (inner->family == 4)
        return inner->fragment;
    switch (inner->protocol) {
    case NEXT_HOP_BY_HOP:
    case NEXT_ROUTING:
    case NEXT_FRAGMENT:
    case NEXT_AUTHENTICATION:
    case NEXT_DESTINATION:
    case NEXT_MOBILITY:
        return true;
    default:
        return false;
    }
}

static struct candidate look_at(const struct joiner *joiner, const uint8_t *packet, const struct inner *inner)
{
    struct candidate candidate = {.slot = UNJOINED};
    uint32_t length = inner->length - inner->header_length;
    bool tcp = inner->protocol == PROTOCOL_TCP, udp = inner->protocol == PROTOCOL_UDP;
    if ((!tcp || length < TCP_HEADER) && (!udp || length < UDP_HEADER))
        return candidate;
    candidate.slot = slot_of(packet, inner, packet + inner->header_length);
    if (has_plain_header(packet, inner)) {
        if (tcp && joiner->allowed & JOIN_TCP)
            look_at_tcp(&candidate, packet, inner);
        else if (udp && joiner->allowed & JOIN_UDP)
            look_at_udp(&candidate, packet, inner);
    }
    return candidate;
}

static uint64_t sum_pseudo(const uint8_t *packet, uint8_t family, uint8_t protocol, uint32_t length)
{
    uint64_t sum = sum_of_be16(protocol) + sum_of_be16(length);
    return checksum_add(sum, packet + (family == 4 ? IPV4_SOURCE : IPV6_SOURCE), family == 4 ? 8 : 32);
}

static bool transport_checksum_right(const uint8_t *packet, uint8_t family, uint8_t protocol, uint32_t length)
{
    uint32_t header = family == 4 ? IPV4_HEADER : IPV6_HEADER;
    uint64_t sum = sum_pseudo(packet, family, protocol, length - header);
    return checksum_fold(checksum_add(sum, packet + header, length - header)) == 0xffff;
}

/* The IP header is the one that cutting the entry would give its next packet. */
static bool network_continues(const struct joined *entry, const uint8_t *packet)
{
    const uint8_t *head = entry->packet;
    if (entry->family == 6)
        return memcmp(head, packet, 4) == 0 && memcmp(head + IPV6_NEXT, packet + IPV6_NEXT, 2 + 32) == 0;
    if (head[IPV4_TOS] != packet[IPV4_TOS] || memcmp(head + IPV4_FIELD, packet + IPV4_FIELD, 4) != 0 ||
        memcmp(head + IPV4_SOURCE, packet + IPV4_SOURCE, 8) != 0)
        return false;
    return load_be16(packet + IPV4_FIELD) & IPV4_DF ||
           load_be16(packet + IPV4_ID) == (uint16_t)(load_be16(head + IPV4_ID) + entry->count);
}

/* So is the transport header; its checksum is another matter. */
static bool transport_continues(const struct joined *entry, const uint8_t *packet)
{
    uint32_t at = entry->family == 4 ? IPV4_HEADER : IPV6_HEADER;
    const uint8_t *head = entry->packet + at, *transport = packet + at;
    if (memcmp(head, transport, 4) != 0) /* ports */
        return false;
    if (entry->protocol == PROTOCOL_UDP)
        return true;
    return load_be32(transport + TCP_SEQUENCE) == entry->next_sequence &&
           memcmp(head + TCP_ACK, transport + TCP_ACK, 5) == 0 && /* and data offset, reserved bits */
           memcmp(head + TCP_WINDOW, transport + TCP_WINDOW, 2) == 0 &&
           memcmp(head + TCP_URGENT, transport + TCP_URGENT, entry->header_length - at - TCP_URGENT) == 0;
}

static bool continues(const struct joined *entry, const struct candidate *candidate, const uint8_t *packet,
                      const struct inner *inner)
{
    unsigned most = entry->protocol == PROTOCOL_TCP ? JOIN_SEGMENTS : JOIN_DATAGRAMS;
    return entry->family == inner->family && entry->protocol == inner->protocol &&
           entry->header_length == candidate->header_length && candidate->payload <= entry->size &&
           entry->count < most && entry->header_length + entry->payload + candidate->payload <= 65535 &&
           network_continues(entry, packet) && transport_continues(entry, packet);
}

/* Most packets are alone in their batch: the first one's checksum is looked at when a second one comes. */
static bool head_verified(struct joined *entry)
{
    if (!entry->verified)
        entry->verified = transport_checksum_right(entry->packet, entry->family, entry->protocol, entry->length);
    return entry->verified;
}

static void append_piece(struct joiner *joiner, struct joined *entry, const uint8_t *packet,
                         const struct candidate *candidate)
{
    uint16_t index = joiner->pieces++;
    joiner->pool[index] = (struct piece){.payload = packet + candidate->header_length, .length = candidate->payload};
    if (entry->count == 0)
        entry->first = index;
    else
        joiner->pool[entry->last].next = index;
    entry->last = index;
    entry->count++;
    entry->payload += candidate->payload;
    entry->next_sequence += candidate->payload;
    entry->tcp_flags |= candidate->tcp_flags;
}

/* Makes an entry of its own; the flow's later packets may be appended to it, and to none before it. */
static void begin_entry(struct joiner *joiner, const uint8_t *packet, const struct inner *inner,
                        const struct candidate *candidate)
{
    struct joined *entry = &joiner->entries[joiner->count++];
    *entry = (struct joined){
        .packet = packet,
        .length = inner->length,
        .header_length = candidate->header_length,
        .size = candidate->payload,
        .family = inner->family,
        .protocol = inner->protocol,
    };
    if (candidate->header_length == 0) {
        entry->count = 1;
        if (candidate->slot != UNJOINED)
            joiner->slots[candidate->slot] = 0;
        return;
    }
    if (inner->protocol == PROTOCOL_TCP)
        entry->next_sequence = load_be32(packet + inner->header_length + TCP_SEQUENCE);
    append_piece(joiner, entry, packet, candidate);
    bool last = candidate->tcp_flags & (TCP_PSH | TCP_FIN);
    joiner->slots[candidate->slot] = last ? 0 : joiner->count;
}

bool join_add(struct joiner *joiner, const uint8_t *packet, const struct inner *inner)
{
    if (joiner->count == JOIN_ENTRIES || joiner->pieces == JOIN_PIECES)
        return false;
    if (hides_ports(inner))
        memset(joiner->slots, 0, sizeof joiner->slots);
    struct candidate candidate = look_at(joiner, packet, inner);
    uint16_t open = candidate.header_length ? joiner->slots[candidate.slot] : 0;
    if (open == 0) {
        begin_entry(joiner, packet, inner, &candidate);
        return true;
    }
    struct joined *entry = &joiner->entries[open - 1];
    if (!continues(entry, &candidate, packet, inner) || !head_verified(entry) ||
        !transport_checksum_right(packet, inner->family, inner->protocol, inner->length)) {
        begin_entry(joiner, packet, inner, &candidate);
        return true;
    }
    append_piece(joiner, entry, packet, &candidate);
    if (candidate.payload < entry->size || candidate.tcp_flags & (TCP_PSH | TCP_FIN))
        joiner->slots[candidate.slot] = 0;
    return true;
}

/* The headers of the super-packet that cutting turns into the entry's packets. */
static void write_headers(const struct joined *entry, struct vnet *vnet, uint8_t *header)
{
    bool ipv4 = entry->family == 4, tcp = entry->protocol == PROTOCOL_TCP;
    uint16_t start = ipv4 ? IPV4_HEADER : IPV6_HEADER;
    uint32_t length = entry->header_length + entry->payload;
    *vnet = (struct vnet){
        .flags = VNET_NEEDS_CSUM,
        .gso_type = tcp ? (ipv4 ? VNET_GSO_TCPV4 : VNET_GSO_TCPV6) : VNET_GSO_UDP_L4,
        .hdr_len = entry->header_length,
        .gso_size = entry->size,
        .csum_start = start,
        .csum_offset = tcp ? TCP_CHECKSUM : UDP_CHECKSUM,
    };
    memcpy(header, entry->packet, entry->header_length);
    if (ipv4) {
        store_be16(header + IPV4_TOTAL_LENGTH, length);
        memset(header + IPV4_CHECKSUM, 0, 2);
        store_checksum(header + IPV4_CHECKSUM, checksum_fold(checksum_add(0, header, IPV4_HEADER)));
    } else {
        store_be16(header + IPV6_PAYLOAD_LENGTH, length - IPV6_HEADER);
    }
    if (tcp)
        header[start + TCP_FLAGS] = entry->tcp_flags;
    else
        store_be16(header + start + UDP_LENGTH, length - start);
    uint16_t pseudo = checksum_fold(sum_pseudo(header, entry->family, entry->protocol, length - start));
    memcpy(header + start + vnet->csum_offset, &pseudo, 2);
}

static struct iovec slice(const uint8_t *bytes, size_t length)
{
    return (struct iovec){.iov_base = (void *)(uintptr_t)bytes, .iov_len = length};
}

size_t join_write(const struct joiner *joiner, size_t index, struct vnet *vnet, uint8_t header[JOIN_HEADER_MAX],
                  struct iovec iov[JOIN_SEGMENTS + 2])
{
    const struct joined *entry = &joiner->entries[index];
    iov[0] = slice((const uint8_t *)vnet, sizeof *vnet);
    if (entry->count == 1) {
        *vnet = (struct vnet){0};
        iov[1] = slice(entry->packet, entry->length);
        return 2;
    }
    write_headers(entry, vnet, header);
    iov[1] = slice(header, entry->header_length);
    uint16_t piece = entry->first;
    for (size_t i = 0; i < entry->count; i++, piece = joiner->pool[piece].next)
        iov[2 + i] = slice(joiner->pool[piece].payload, joiner->pool[piece].length);
    return 2 + (size_t)entry->count;
}

uint32_t join_bytes(const struct joiner *joiner, size_t index)
{
    const struct joined *entry = &joiner->entries[index];
    return entry->count == 1 ? entry->length : (uint32_t)entry->count * entry->header_length + entry->payload;
}

size_t join_split(const struct joiner *joiner, size_t index, struct iovec iov[JOIN_SEGMENTS])
{
    const struct joined *entry = &joiner->entries[index];
    if (entry->count == 1) {
        iov[0] = slice(entry->packet, entry->length);
        return 1;
    }
    uint16_t piece = entry->first;
    for (size_t i = 0; i < entry->count; i++, piece = joiner->pool[piece].next) {
        const struct piece *part = &joiner->pool[piece];
        iov[i] = slice(part->payload - entry->header_length, entry->header_length + (size_t)part->length);
    }
    return entry->count;
}
