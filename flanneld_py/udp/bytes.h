/* Fields of packets and tables at any address, and where they are in the headers. */
#ifndef FLANNELD_UDP_BYTES_H
#define FLANNELD_UDP_BYTES_H

#include <stdint.h>
#include <string.h>

/* IPv4 header (RFC 791) */
#define IPV4_TOS 1
#define IPV4_TOTAL_LENGTH 2
#define IPV4_ID 4
#define IPV4_FIELD 6 /* flags and fragment offset */
#define IPV4_TTL 8
#define IPV4_PROTOCOL 9
#define IPV4_CHECKSUM 10
#define IPV4_SOURCE 12
#define IPV4_DESTINATION 16
#define IPV4_RESERVED 0x8000 /* in the field */
#define IPV4_DF 0x4000
#define IPV4_MF 0x2000
#define IPV4_OFFSET 0x1fff

/* IPv6 header (RFC 8200) */
#define IPV6_PAYLOAD_LENGTH 4
#define IPV6_NEXT 6
#define IPV6_HOP_LIMIT 7
#define IPV6_SOURCE 8
#define IPV6_DESTINATION 24

/* Protocols, next headers */
#define PROTOCOL_ICMP 1
#define PROTOCOL_TCP 6
#define PROTOCOL_UDP 17
#define PROTOCOL_ICMPV6 58
#define NEXT_HOP_BY_HOP 0
#define NEXT_ROUTING 43
#define NEXT_FRAGMENT 44
#define NEXT_AUTHENTICATION 51
#define NEXT_DESTINATION 60
#define NEXT_MOBILITY 135

/* TCP header (RFC 9293) */
#define TCP_HEADER 20
#define TCP_SEQUENCE 4
#define TCP_ACK 8
#define TCP_DATA_OFFSET 12
#define TCP_FLAGS 13
#define TCP_WINDOW 14
#define TCP_CHECKSUM 16
#define TCP_URGENT 18
#define TCP_FIN 0x01
#define TCP_PSH 0x08
#define TCP_ACK_FLAG 0x10
#define TCP_CWR 0x80

/* UDP header (RFC 768) */
#define UDP_HEADER 8
#define UDP_LENGTH 4
#define UDP_CHECKSUM 6

static inline uint16_t load_be16(const uint8_t *p)
{
    return (uint16_t)(p[0] << 8 | p[1]);
}

static inline uint32_t load_be32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static inline uint16_t load_le16(const uint8_t *p)
{
    return (uint16_t)(p[1] << 8 | p[0]);
}

static inline uint32_t load_le32(const uint8_t *p)
{
    return (uint32_t)p[3] << 24 | (uint32_t)p[2] << 16 | (uint32_t)p[1] << 8 | p[0];
}

static inline void store_be16(uint8_t *p, uint32_t value)
{
    p[0] = (uint8_t)(value >> 8);
    p[1] = (uint8_t)value;
}

static inline void store_be32(uint8_t *p, uint32_t value)
{
    store_be16(p, value >> 16);
    store_be16(p + 2, value);
}

/* A number's 16-bit words as they would lie in memory: what checksum_add would find there. */
static inline uint64_t sum_of_be16(uint32_t value)
{
    uint8_t bytes[2];
    uint16_t word;
    store_be16(bytes, value);
    memcpy(&word, bytes, 2);
    return word;
}

static inline uint64_t sum_of_be32(uint32_t value)
{
    return sum_of_be16(value >> 16) + sum_of_be16(value);
}

/* Writes the complement of a folded sum: what a checksum field holds. */
static inline void store_checksum(uint8_t *p, uint16_t folded)
{
    folded = (uint16_t)~folded;
    memcpy(p, &folded, 2);
}

#endif
