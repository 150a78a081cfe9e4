#include "ways.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* Missing in the headers of older systems, whose kernels may well be newer. */
#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

#define PARK_MS 50
#define FAILING_NS (3 * 1000000000ull) /* of reads that all fail: another process may do better */
#define STACK (1 << 20)
#define WAKE SIGUSR1 /* ends a thread's wait for packets */

uint64_t pump_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

_Noreturn void pump_fail(struct pump *pump, const char *why)
{
    const char *none = NULL;
    atomic_compare_exchange_strong(&pump->failure, &none, why);
    eventfd_write(pump->failure_fd, 1);
    for (;;)
        pause();
}

void pump_read_failed(struct pump *pump, enum way way, int error)
{
    struct direction *direction = &pump->ways[way];
    uint64_t now = pump_now();
    if (error == EINTR)
        return;
    count(&direction->counts[COUNT_READ_ERRORS], 1);
    if (direction->failing_since == 0)
        direction->failing_since = now;
    if (now - direction->failing_since > FAILING_NS) {
        snprintf(direction->failure, sizeof direction->failure, "%s cannot be read: %s",
                 way == SEND ? "the TUN device" : "the UDP socket", strerror(error));
        pump_fail(pump, direction->failure);
    }
    nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
}

/* ---- Batches and tables -------------------------------------------------------------------------------------- */

void batch_goes_on(struct pump *pump, enum way way)
{
    atomic_store_explicit(&pump->ways[way].busy_since, pump_now(), memory_order_relaxed);
}

const struct table *batch_begin(struct pump *pump, enum way way)
{
    struct direction *direction = &pump->ways[way];
    struct held *held = atomic_load(&pump->current);
    batch_goes_on(pump, way);
    direction->failing_since = 0;
    for (;;) {
        atomic_store(&direction->in_use, held);
        struct held *still = atomic_load(&pump->current);
        if (still == held)
            return &held->table;
        held = still;
    }
}

void batch_end(struct pump *pump, enum way way)
{
    struct direction *direction = &pump->ways[way];
    atomic_store_explicit(&direction->in_use, NULL, memory_order_release);
    atomic_store_explicit(&direction->busy_since, 0, memory_order_release);
}

void pump_may_read(struct pump *pump, enum way way)
{
    if (!atomic_load_explicit(&pump->parking, memory_order_relaxed))
        return;
    atomic_store(&pump->ways[way].parked, true);
    for (;;)
        pause();
}

/* Frees the tables that no batch uses any more; the others stay for the next time. */
static void free_retired(struct pump *pump)
{
    struct held **link = &pump->retired;
    while (*link != NULL) {
        struct held *held = *link;
        if (atomic_load(&pump->ways[SEND].in_use) == held || atomic_load(&pump->ways[RECEIVE].in_use) == held) {
            link = &held->next;
        } else {
            *link = held->next;
            free(held);
        }
    }
}

static void wake(int signal)
{
    (void)signal;
}

static const char *start_threads(struct pump *pump)
{
    static void *(*const loops[WAYS])(void *) = {send_loop, receive_loop};
    const char *wrong = NULL;
    sigset_t all, before;
    pthread_attr_t attributes;
    sigaction(WAKE, &(struct sigaction){.sa_handler = wake}, NULL); /* without SA_RESTART */
    sigfillset(&all);
    sigdelset(&all, WAKE);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the main thread's */
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (int way = 0; way < WAYS; way++) {
        if (pthread_create(&pump->ways[way].thread, &attributes, loops[way], pump) != 0) {
            wrong = "no thread can be started";
            break;
        }
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return wrong;
}

const char *pump_set_table(struct pump *pump, const uint8_t *bytes, size_t length)
{
    struct held *held = malloc(sizeof *held + length);
    if (held == NULL)
        return "no memory";
    memcpy(held->bytes, bytes, length);
    const char *wrong = table_open(&held->table, held->bytes, length);
    if (wrong != NULL) {
        free(held);
        return wrong;
    }
    held->next = NULL;
    struct held *old = atomic_exchange(&pump->current, held);
    if (old != NULL) {
        old->next = pump->retired;
        pump->retired = old;
    }
    free_retired(pump);
    if (pump->running)
        return NULL;
    pump->running = true;
    wrong = start_threads(pump);
    if (wrong != NULL) {
        atomic_store(&pump->failure, wrong);
        eventfd_write(pump->failure_fd, 1);
    }
    return NULL;
}

/* ---- Start ----------------------------------------------------------------------------------------------------- */

static bool prepare_tun(int tun, struct offloads *offloads, const char **what)
{
    struct ifreq request = {0};
    int size = sizeof(struct vnet);
    *what = "TUNGETIFF (is it a TUN device, and still there?)";
    if (ioctl(tun, TUNGETIFF, &request) != 0)
        return false;
    if ((request.ifr_flags & IFF_VNET_HDR) == 0) {
        *what = "the TUN device was opened without IFF_VNET_HDR";
        errno = EINVAL;
        return false;
    }
    *what = "TUNSETVNETHDRSZ";
    if (ioctl(tun, TUNSETVNETHDRSZ, &size) != 0)
        return false;
    *what = "TUNSETOFFLOAD";
    unsigned long tso = offloads->tso ? TUN_F_TSO4 | TUN_F_TSO6 : 0;
    unsigned long uso = offloads->uso ? TUN_F_USO4 | TUN_F_USO6 : 0;
    if (ioctl(tun, TUNSETOFFLOAD, TUN_F_CSUM | tso | uso) == 0)
        return true;
    offloads->uso = false; /* kernels before 6.2 */
    if (ioctl(tun, TUNSETOFFLOAD, TUN_F_CSUM | tso) == 0)
        return true;
    offloads->tso = false;
    return ioctl(tun, TUNSETOFFLOAD, TUN_F_CSUM) == 0;
}

static bool prepare_udp(int udp, struct offloads *offloads, const char **what)
{
    int on = offloads->udp_gro, whole = IP_PMTUDISC_DO, size;
    socklen_t length = sizeof size;
    if (setsockopt(udp, IPPROTO_UDP, UDP_GRO, &on, sizeof on) != 0)
        offloads->udp_gro = false; /* kernels before 5.0 */
    if (offloads->udp_segment && getsockopt(udp, IPPROTO_UDP, UDP_SEGMENT, &size, &length) != 0)
        offloads->udp_segment = false; /* kernels before 4.18 */
    *what = "IP_MTU_DISCOVER (is it a UDP socket for IPv4?)";
    return setsockopt(udp, IPPROTO_IP, IP_MTU_DISCOVER, &whole, sizeof whole) == 0;
}

/* Both threads block in their first read, which is quicker than poll and read; sends never do. */
static bool make_blocking(int fd, const char **what)
{
    int flags = fcntl(fd, F_GETFL);
    *what = "O_NONBLOCK";
    return flags >= 0 && fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) == 0;
}

struct pump *pump_new(int tun, int udp, struct offloads *offloads, const char **what)
{
    if (!prepare_tun(tun, offloads, what) || !prepare_udp(udp, offloads, what) || !make_blocking(tun, what) ||
        !make_blocking(udp, what))
        return NULL;
    *what = "memory";
    struct pump *pump = aligned_alloc(_Alignof(struct pump), sizeof *pump);
    if (pump == NULL)
        return NULL;
    memset(pump, 0, sizeof *pump);
    *what = "eventfd";
    pump->failure_fd = eventfd(0, EFD_CLOEXEC);
    if (pump->failure_fd < 0) {
        free(pump);
        return NULL;
    }
    pump->tun = tun;
    pump->udp = udp;
    pump->offloads = *offloads;
    pump_open_lanes(pump);
    pump->icmp4 = socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_RAW);
    pump->icmp6 = socket(AF_INET6, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_RAW);
    return pump;
}

/* ---- From outside ------------------------------------------------------------------------------------------------ */

void pump_counters(const struct pump *pump, uint64_t counters[COUNTERS])
{
    uint64_t now = pump_now();
    for (int way = 0; way < WAYS; way++) {
        const struct direction *direction = &pump->ways[way];
        for (int i = 0; i < COUNTS_OF_TRAFFIC; i++)
            *counters++ = atomic_load_explicit(&direction->counts[i], memory_order_relaxed);
        uint64_t since = atomic_load_explicit(&direction->busy_since, memory_order_relaxed);
        counters[COUNT_BUSY_MS - COUNTS_OF_TRAFFIC] = since != 0 && now > since ? (now - since) / 1000000 : 0;
        for (int i = DROP_NONE + 1; i < DROPS; i++)
            *counters++ = atomic_load_explicit(&direction->drops[i], memory_order_relaxed);
    }
}

void pump_counter_name(unsigned counter, char name[64])
{
    static const char *const traffic[] = {
#define X(symbol, name) name,
        COUNTS(X)
#undef X
    };
    static const char *const ways[WAYS] = {"send", "receive"};
    const char *way = ways[counter / (COUNTERS / WAYS)];
    counter %= COUNTERS / WAYS;
    if (counter < COUNTS_OF_TRAFFIC)
        snprintf(name, 64, "%s.%s", way, traffic[counter]);
    else
        snprintf(name, 64, "%s.drop.%s", way, drop_names[counter - COUNTS_OF_TRAFFIC + 1]);
}

const char *pump_wait(struct pump *pump, int fd)
{
    struct pollfd fds[] = {{.fd = fd, .events = POLLIN}, {.fd = pump->failure_fd, .events = POLLIN}};
    while (poll(fds, 2, -1) < 0 && errno == EINTR)
        ;
    return atomic_load(&pump->failure);
}

void pump_park(struct pump *pump)
{
    uint64_t end = pump_now() + PARK_MS * 1000000ull;
    atomic_store(&pump->parking, true);
    for (bool parked = !pump->running; !parked && pump_now() < end;) {
        parked = true;
        for (int way = 0; way < WAYS; way++) {
            if (atomic_load(&pump->ways[way].parked))
                continue;
            parked = false; /* again and again, as the signal may come just before the read */
            pthread_kill(pump->ways[way].thread, WAKE);
        }
        nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    }
}
