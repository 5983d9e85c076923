/* The addresses that a process tries to reach: a socket of this machine that does not answer, as behind a firewall. */
#include "testing.h"

#include "comm/tried.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CALLERS = 6, TRIES = 1000 };

/* Listens, but takes nobody in: the queue is full after the first callers, and those after them wait. */
static int listener(int family, struct sockaddr_storage *at, socklen_t *n_bytes) {
    int fd = socket(family, SOCK_STREAM, 0);
    memset(at, 0, sizeof *at);
    at->ss_family = (sa_family_t)family;
    *n_bytes = family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
    if (family == AF_INET)
        ((struct sockaddr_in *)at)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    else
        ((struct sockaddr_in6 *)at)->sin6_addr = in6addr_loopback;
    if (fd < 0 || bind(fd, (struct sockaddr *)at, *n_bytes) || listen(fd, 0) ||
        getsockname(fd, (struct sockaddr *)at, n_bytes)) {
        if (fd >= 0) close(fd);
        return -1;
    }
    return fd;
}

/* Waits until there is an address, or none: `some`. */
static int wait_for(bool some, char *text, size_t bytes) {
    int n = -1;
    for (int i = 0; i < TRIES; i++) {
        n = addresses_tried(text, bytes);
        if ((n > 0) == some) break;
        nanosleep(&(struct timespec){.tv_nsec = 1000 * 1000}, NULL);
    }
    return n;
}

static void test_family(int family, const char *format) {
    struct sockaddr_storage at;
    socklen_t n_bytes;
    char wanted[80], text[200], little[8];
    int callers[CALLERS], fd = listener(family, &at, &n_bytes);
    if (fd < 0) return; /* no IPv6 */
    snprintf(wanted, sizeof wanted, format,
             ntohs(family == AF_INET ? ((struct sockaddr_in *)&at)->sin_port
                                     : ((struct sockaddr_in6 *)&at)->sin6_port));
    for (int i = 0; i < CALLERS; i++) {
        callers[i] = socket(family, SOCK_STREAM | SOCK_NONBLOCK, 0);
        if (connect(callers[i], (struct sockaddr *)&at, n_bytes)) EXPECT(errno == EINPROGRESS);
    }
    EXPECT(wait_for(true, text, sizeof text) == 1);
    EXPECT(!strcmp(text, wanted));
    EXPECT(addresses_tried(little, sizeof little) == 0 && !*little);
    for (int i = 0; i < CALLERS; i++) close(callers[i]);
    close(fd);
    EXPECT(wait_for(false, text, sizeof text) == 0 && !*text);
}

static void test_addresses(void) {
    test_case("IPv4");
    test_family(AF_INET, "127.0.0.1:%d");
    test_case("IPv6");
    test_family(AF_INET6, "[::1]:%d");
}

TEST_API_MAIN({"addresses", test_addresses})
