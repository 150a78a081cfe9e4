/* Loaded before libc (LD_PRELOAD): a kernel or a network card that refuses some offloads, as $REFUSED lists them.
 *
 *   uso, tso            TUNSETOFFLOAD with these: EINVAL (USO: kernels before 6.2)
 *   udp_gro             setsockopt: ENOPROTOOPT (before 5.0)
 *   udp_segment         getsockopt: ENOPROTOOPT (before 4.18)
 *   nowait              preadv2 with RWF_NOWAIT on a TUN: EOPNOTSUPP (before 5.11)
 *   EIO@192.0.2.2       a send with UDP_SEGMENT to this address; also EINVAL, EMSGSIZE, ENOBUFS
 *   write-tcp, write-udp  a write of a super-packet to the TUN: EINVAL
 *   receive             every read of an IPv4 socket: ENOTCONN
 *   read                every read of a TUN: EIO
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define SEGMENT_OPTION 103
#define GRO_OPTION 104
#define TSO_BITS 0x06
#define USO_BITS 0x60
#define GSO_TYPES 0x7f
#define GSO_UDP 5
#define VNET_HEADER 10

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))

static int refuse(int error)
{
    errno = error;
    return -1;
}

static bool refused(const char *what)
{
    const char *list = getenv("REFUSED");
    size_t length = strlen(what);
    for (const char *at = list; at != NULL && (at = strstr(at, what)) != NULL; at += length)
        if ((at == list || at[-1] == ',') && (at[length] == 0 || at[length] == ','))
            return true;
    return false;
}

static int refused_send(const struct msghdr *message)
{
    static const struct {
        const char *name;
        int error;
    } errors[] = {{"EIO", EIO}, {"EINVAL", EINVAL}, {"EMSGSIZE", EMSGSIZE}, {"ENOBUFS", ENOBUFS}};
    const struct sockaddr_in *to = message->msg_name;
    char what[64], *end;
    if (message->msg_controllen == 0 || to == NULL || to->sin_family != AF_INET)
        return 0;
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++) {
        end = stpcpy(what, errors[i].name);
        *end++ = '@';
        inet_ntop(AF_INET, &to->sin_addr, end, INET_ADDRSTRLEN);
        if (refused(what))
            return errors[i].error;
    }
    return 0;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    int error = refused_send(message);
    return error != 0 ? refuse(error) : REAL(sendmsg)(fd, message, flags);
}

int sendmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags)
{
    unsigned good = 0;
    int error = 0;
    while (good < count && (error = refused_send(&messages[good].msg_hdr)) == 0)
        good++;
    return good == 0 && error != 0 ? refuse(error) : REAL(sendmmsg)(fd, messages, good, flags);
}

ssize_t writev(int fd, const struct iovec *iov, int count)
{
    if (count >= 2 && iov[0].iov_len == VNET_HEADER) {
        unsigned type = ((const uint8_t *)iov[0].iov_base)[1] & GSO_TYPES;
        if (type != 0 && refused(type == GSO_UDP ? "write-udp" : "write-tcp"))
            return refuse(EINVAL);
    }
    return REAL(writev)(fd, iov, count);
}

static bool is_tun(int fd)
{
    struct ifreq request;
    return REAL(ioctl)(fd, TUNGETIFF, &request) == 0;
}

static bool is_ipv4(int fd)
{
    struct sockaddr_storage here = {0};
    socklen_t length = sizeof here;
    return getsockname(fd, (struct sockaddr *)&here, &length) == 0 && here.ss_family == AF_INET;
}

ssize_t read(int fd, void *buffer, size_t length)
{
    return refused("read") && is_tun(fd) ? refuse(EIO) : REAL(read)(fd, buffer, length);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
    return refused("receive") && is_ipv4(fd) ? refuse(ENOTCONN) : REAL(recvmsg)(fd, message, flags);
}

int recvmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags, struct timespec *timeout)
{
    return refused("receive") && is_ipv4(fd) ? refuse(ENOTCONN)
                                              : REAL(recvmmsg)(fd, messages, count, flags, timeout);
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    unsigned long argument = va_arg(arguments, unsigned long);
    va_end(arguments);
    if ((unsigned)request == TUNSETOFFLOAD &&
        ((argument & USO_BITS && refused("uso")) || (argument & TSO_BITS && refused("tso"))))
        return refuse(EINVAL);
    return REAL(ioctl)(fd, request, argument);
}

int setsockopt(int fd, int level, int option, const void *value, socklen_t length)
{
    if (level == IPPROTO_UDP && option == GRO_OPTION && refused("udp_gro"))
        return refuse(ENOPROTOOPT);
    return REAL(setsockopt)(fd, level, option, value, length);
}

int getsockopt(int fd, int level, int option, void *value, socklen_t *length)
{
    if (level == IPPROTO_UDP && option == SEGMENT_OPTION && refused("udp_segment"))
        return refuse(ENOPROTOOPT);
    return REAL(getsockopt)(fd, level, option, value, length);
}

ssize_t preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
    if (flags & RWF_NOWAIT && refused("nowait"))
        return refuse(EOPNOTSUPP);
    if (refused("read") && is_tun(fd))
        return refuse(EIO);
    return REAL(preadv2)(fd, iov, count, offset, flags);
}

/* The same where off_t is told apart. */
ssize_t preadv64v2(int fd, const struct iovec *iov, int count, off64_t offset, int flags)
{
    return preadv2(fd, iov, count, (off_t)offset, flags);
}
