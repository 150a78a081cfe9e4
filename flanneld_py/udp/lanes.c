/* What a pump sends by: sockets for shares of the peers, and for ICMP errors; what the kernel knows of a path. */
#include "ways.h"

#include <errno.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef UDP_GRO
#define UDP_GRO 104
#endif

#define OUTER_HEADERS 28 /* IPv4 and UDP */

/* -1 when it cannot be had. UDP_GRO as of `udp`: the kernel may ask any socket of a group whether to join packets. */
static int open_lane(int udp, const struct sockaddr_in *here, const struct offloads *offloads)
{
    int on = 1, gro = offloads->udp_gro, whole = IP_PMTUDISC_DO, twice = 0;
    socklen_t length = sizeof twice;
    int lane = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (lane < 0)
        return -1;
    getsockopt(udp, SOL_SOCKET, SO_SNDBUF, &twice, &length);
    int size = twice / 2; /* socket(7): the kernel doubles what it is given */
    if (setsockopt(lane, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size) != 0)
        setsockopt(lane, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    if ((gro && setsockopt(lane, IPPROTO_UDP, UDP_GRO, &gro, sizeof gro) != 0) ||
        setsockopt(lane, IPPROTO_IP, IP_MTU_DISCOVER, &whole, sizeof whole) != 0 ||
        setsockopt(lane, SOL_SOCKET, SO_REUSEPORT, &on, sizeof on) != 0 ||
        bind(lane, (const struct sockaddr *)here, sizeof *here) != 0) {
        close(lane);
        return -1;
    }
    return lane;
}

/* The group's program gives every packet to its first socket, `udp` (socket(7), SO_ATTACH_REUSEPORT_CBPF). It must
 * have been attached before `udp` was bound; again it is only to find out whether it was. Who asks for the port
 * without this option is refused it as ever; who has it, and is the same user, may join and gets nothing. */
void pump_open_lanes(struct pump *pump)
{
    int on = 1, off = 0;
    struct sock_filter first = BPF_STMT(BPF_RET | BPF_K, 0);
    struct sock_fprog program = {.len = 1, .filter = &first};
    struct sockaddr_in here;
    socklen_t length = sizeof here;
    for (int i = 0; i < LANES; i++)
        pump->lanes[i] = pump->udp;
    if (getsockname(pump->udp, (struct sockaddr *)&here, &length) != 0 || here.sin_port == 0 ||
        setsockopt(pump->udp, SOL_SOCKET, SO_REUSEPORT, &on, sizeof on) != 0)
        return;
    if (setsockopt(pump->udp, SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, &program, sizeof program) == 0) {
        for (int i = 0; i < LANES; i++) {
            int lane = open_lane(pump->udp, &here, &pump->offloads);
            if (lane < 0)
                break;
            pump->lanes[i] = lane;
        }
    }
    setsockopt(pump->udp, SOL_SOCKET, SO_REUSEPORT, &off, sizeof off);
}

int pump_lane(const struct pump *pump, uint32_t address_be)
{
    const uint8_t *byte = (const uint8_t *)&address_be;
    return pump->lanes[(byte[0] + 7u * byte[1] + 31u * byte[2] + byte[3]) % LANES];
}

enum drop pump_refusal(int error)
{
    return error == EAGAIN ? DROP_QUEUE_FULL : DROP_SEND_FAILED;
}

bool pump_send_icmp(const struct pump *pump, const uint8_t *packet, size_t length)
{
    if (packet[0] >> 4 == 4) {
        struct sockaddr_in to = {.sin_family = AF_INET};
        memcpy(&to.sin_addr, packet + 16, sizeof to.sin_addr);
        return sendto(pump->icmp4, packet, length, MSG_DONTWAIT, (struct sockaddr *)&to, sizeof to) >= 0;
    }
    struct sockaddr_in6 to = {.sin6_family = AF_INET6};
    memcpy(&to.sin6_addr, packet + 24, sizeof to.sin6_addr);
    return sendto(pump->icmp6, packet, length, MSG_DONTWAIT, (struct sockaddr *)&to, sizeof to) >= 0;
}

uint16_t pump_path_mtu(const struct sockaddr_in *to)
{
    int mtu = 0, probe = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    socklen_t length = sizeof mtu;
    if (probe < 0)
        return 0;
    if (connect(probe, (const struct sockaddr *)to, sizeof *to) != 0 ||
        getsockopt(probe, IPPROTO_IP, IP_MTU, &mtu, &length) != 0)
        mtu = 0;
    close(probe);
    return mtu < 68 + OUTER_HEADERS ? 0 : mtu > UINT16_MAX ? UINT16_MAX : (uint16_t)(mtu - OUTER_HEADERS);
}
