/* The packed table: checked once, then searched where it lies. */
#include "packet.h"

#include "bytes.h"

#define PEER_SIZE ((size_t)8)
#define RANGE4_SIZE ((size_t)12)
#define RANGE6_SIZE ((size_t)36)
#define NETWORK4_SIZE ((size_t)8)
#define NETWORK6_SIZE ((size_t)32)
#define HAS_IPV4 1
#define HAS_IPV6 2

static const char *open_header(struct table *table, const uint8_t *bytes, size_t length)
{
    if (length < TABLE_HEADER)
        return "shorter than its header";
    if (memcmp(bytes, "FPT1", 4) != 0)
        return "magic: not FPT1";
    if (load_le32(bytes + 4) != length)
        return "length: not that of the table";
    if (bytes[8] > SOURCE_STRICT)
        return "source check: not 0, 1 or 2";
    if (bytes[9] & ~(HAS_IPV4 | HAS_IPV6))
        return "own families: unknown bits";
    *table = (struct table){
        .source_check = (enum source_check)bytes[8],
        .has4 = bytes[9] & HAS_IPV4,
        .has6 = bytes[9] & HAS_IPV6,
        .mtu = load_le16(bytes + 10),
        .peer_count = load_le32(bytes + 12),
        .range4_count = load_le32(bytes + 16),
        .range6_count = load_le32(bytes + 20),
        .network4_count = load_le32(bytes + 24),
        .network6_count = load_le32(bytes + 28),
        .own4_first = load_le32(bytes + 32),
        .own4_last = load_le32(bytes + 36),
        .address4 = load_le32(bytes + 40),
        .own6_first = bytes + 44,
        .own6_last = bytes + 60,
        .address6 = bytes + 76,
    };
    if (table->mtu < 68 || table->mtu > 65507)
        return "mtu: not 68 to 65507";
    if (table->own4_first > table->own4_last || memcmp(table->own6_first, table->own6_last, 16) > 0)
        return "own subnet: ends before it begins";
    if (table->network4_count > TABLE_NETWORKS_MAX || table->network6_count > TABLE_NETWORKS_MAX)
        return "networks: more than 16 of a family";
    return NULL;
}

/* Sets where each part begins; 64-bit sums, for the counts may be any. */
static const char *place_parts(struct table *table, const uint8_t *bytes, size_t length)
{
    uint64_t end = TABLE_HEADER + (uint64_t)table->peer_count * PEER_SIZE +
                   (uint64_t)table->range4_count * RANGE4_SIZE + (uint64_t)table->range6_count * RANGE6_SIZE +
                   (uint64_t)table->network4_count * NETWORK4_SIZE + (uint64_t)table->network6_count * NETWORK6_SIZE;
    if (end != length)
        return "counts: do not make up the length";
    table->peers = bytes + TABLE_HEADER;
    table->ranges4 = table->peers + table->peer_count * PEER_SIZE;
    table->ranges6 = table->ranges4 + table->range4_count * RANGE4_SIZE;
    table->networks4 = table->ranges6 + table->range6_count * RANGE6_SIZE;
    table->networks6 = table->networks4 + table->network4_count * NETWORK4_SIZE;
    return NULL;
}

static const char *check_peers(const struct table *table)
{
    for (uint32_t i = 0; i < table->peer_count; i++) {
        const uint8_t *peer = table->peers + i * PEER_SIZE;
        if (load_be32(peer) == 0 || load_be16(peer + 4) == 0)
            return "peers: address or port is 0";
        if (load_le16(peer + 6) & ~PEER_IPV6)
            return "peers: unknown flags";
        if (i > 0 && load_be32(peer - PEER_SIZE) >= load_be32(peer))
            return "peers: not sorted, or not unique";
    }
    return NULL;
}

/* First and last of `count` IPv4 ranges, `stride` bytes apart. */
static bool ascending4(const uint8_t *range, uint32_t count, size_t stride)
{
    for (uint32_t i = 0; i < count; i++, range += stride)
        if (load_le32(range) > load_le32(range + 4) || (i > 0 && load_le32(range - stride + 4) >= load_le32(range)))
            return false;
    return true;
}

static bool ascending6(const uint8_t *range, uint32_t count, size_t stride)
{
    for (uint32_t i = 0; i < count; i++, range += stride)
        if (memcmp(range, range + 16, 16) > 0 || (i > 0 && memcmp(range - stride + 16, range, 16) >= 0))
            return false;
    return true;
}

static const char *check_ranges(const struct table *table)
{
    if (!ascending4(table->ranges4, table->range4_count, RANGE4_SIZE))
        return "ranges4: not sorted, or overlapping";
    if (!ascending6(table->ranges6, table->range6_count, RANGE6_SIZE))
        return "ranges6: not sorted, or overlapping";
    if (!ascending4(table->networks4, table->network4_count, NETWORK4_SIZE))
        return "networks4: not sorted, or overlapping";
    if (!ascending6(table->networks6, table->network6_count, NETWORK6_SIZE))
        return "networks6: not sorted, or overlapping";
    for (uint32_t i = 0; i < table->range4_count; i++)
        if (load_le32(table->ranges4 + i * RANGE4_SIZE + 8) >= table->peer_count)
            return "ranges4: no such peer";
    for (uint32_t i = 0; i < table->range6_count; i++)
        if (load_le32(table->ranges6 + i * RANGE6_SIZE + 32) >= table->peer_count)
            return "ranges6: no such peer";
    return NULL;
}

const char *table_open(struct table *table, const uint8_t *bytes, size_t length)
{
    struct table opened;
    const char *wrong = open_header(&opened, bytes, length);
    if (!wrong)
        wrong = place_parts(&opened, bytes, length);
    if (!wrong)
        wrong = check_peers(&opened);
    if (!wrong)
        wrong = check_ranges(&opened);
    if (!wrong)
        *table = opened;
    return wrong;
}

struct peer table_peer(const struct table *table, uint32_t index)
{
    const uint8_t *bytes = table->peers + index * PEER_SIZE;
    struct peer peer = {.flags = load_le16(bytes + 6)};
    memcpy(&peer.address_be, bytes, 4);
    memcpy(&peer.port_be, bytes + 4, 2);
    return peer;
}

uint32_t table_find_peer(const struct table *table, uint32_t address_be)
{
    uint8_t bytes[4];
    memcpy(bytes, &address_be, 4);
    uint32_t wanted = load_be32(bytes), low = 0, high = table->peer_count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2, address = load_be32(table->peers + middle * PEER_SIZE);
        if (address == wanted)
            return middle;
        if (address < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return PEER_UNKNOWN;
}

uint32_t table_route4(const struct table *table, struct cursor *cursor, const uint8_t *address)
{
    uint32_t wanted = load_be32(address), low = 0, high = table->range4_count, middle = cursor->range4;
    if (middle >= high)
        middle = high / 2;
    while (low < high) {
        const uint8_t *range = table->ranges4 + middle * RANGE4_SIZE;
        if (wanted < load_le32(range)) {
            high = middle;
        } else if (wanted > load_le32(range + 4)) {
            low = middle + 1;
        } else {
            cursor->range4 = middle;
            return load_le32(range + 8);
        }
        middle = low + (high - low) / 2;
    }
    return PEER_UNKNOWN;
}

uint32_t table_route6(const struct table *table, struct cursor *cursor, const uint8_t *address)
{
    uint32_t low = 0, high = table->range6_count, middle = cursor->range6;
    if (middle >= high)
        middle = high / 2;
    while (low < high) {
        const uint8_t *range = table->ranges6 + middle * RANGE6_SIZE;
        if (memcmp(address, range, 16) < 0) {
            high = middle;
        } else if (memcmp(address, range + 16, 16) > 0) {
            low = middle + 1;
        } else {
            cursor->range6 = middle;
            return load_le32(range + 32);
        }
        middle = low + (high - low) / 2;
    }
    return PEER_UNKNOWN;
}
