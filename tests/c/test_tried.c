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

enum { CALLERS = 6, TRIES = 1000, ROUNDS = 4 };

/* Listens, but takes nobody in: the queue is full after the first callers, and those after them wait. A port of 0 is
 * any. */
static int listener(int family, int port, struct sockaddr_storage *at, socklen_t *n_bytes) {
    int fd = socket(family, SOCK_STREAM, 0);
    memset(at, 0, sizeof *at);
    at->ss_family = (sa_family_t)family;
    *n_bytes = family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
    if (family == AF_INET)
        ((struct sockaddr_in *)at)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    else
        ((struct sockaddr_in6 *)at)->sin6_addr = in6addr_loopback;
    ((struct sockaddr_in *)at)->sin_port = htons((uint16_t)port); /* of both in the same place */
    if (fd < 0 || bind(fd, (struct sockaddr *)at, *n_bytes) || listen(fd, 0) ||
        getsockname(fd, (struct sockaddr *)at, n_bytes)) {
        if (fd >= 0) close(fd);
        return -1;
    }
    return fd;
}

/* Waits until there are so many addresses. */
static int wait_for(int wanted, char *text, size_t bytes) {
    int n = -1;
    for (int i = 0; i < TRIES; i++) {
        n = addresses_tried(text, bytes);
        if (n == wanted) break;
        nanosleep(&(struct timespec){.tv_nsec = 1000 * 1000}, NULL);
    }
    return n;
}

static int caller(const struct sockaddr_storage *at, socklen_t n_bytes) {
    int fd = socket(at->ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (connect(fd, (const struct sockaddr *)at, n_bytes)) EXPECT(errno == EINPROGRESS);
    return fd;
}

static void test_family(int family, const char *format) {
    struct sockaddr_storage at;
    socklen_t n_bytes;
    char wanted[80], text[200], little[8];
    int callers[CALLERS], fd = listener(family, 0, &at, &n_bytes);
    if (fd < 0) return; /* no IPv6 */
    snprintf(wanted, sizeof wanted, format,
             ntohs(family == AF_INET ? ((struct sockaddr_in *)&at)->sin_port
                                     : ((struct sockaddr_in6 *)&at)->sin6_port));
    for (int i = 0; i < CALLERS; i++) callers[i] = caller(&at, n_bytes);
    EXPECT(wait_for(1, text, sizeof text) == 1);
    EXPECT(!strcmp(text, wanted));
    EXPECT(addresses_tried(little, sizeof little) == 0 && !*little);
    for (int i = 0; i < CALLERS; i++) close(callers[i]);
    close(fd);
    EXPECT(wait_for(0, text, sizeof text) == 0 && !*text);
}

static void test_addresses(void) {
    test_case("IPv4");
    test_family(AF_INET, "127.0.0.1:%d");
    test_case("IPv6");
    test_family(AF_INET6, "[::1]:%d");
}

/* Two listeners of which one's port begins with all digits of the other's. */
static bool listen_alike(int fds[2], struct sockaddr_storage at[2], socklen_t *n_bytes) {
    for (int port = 2000; port < 2000 + TRIES; port++) {
        fds[0] = listener(AF_INET, port, &at[0], n_bytes);
        fds[1] = fds[0] < 0 ? -1 : listener(AF_INET, 10 * port, &at[1], n_bytes);
        if (fds[1] >= 0) return true;
        if (fds[0] >= 0) close(fds[0]);
    }
    return false;
}

/* Both are named, whichever of them the system lists first, which is another one in other rounds. */
static void test_part_of_another(void) {
    struct sockaddr_storage at[2];
    socklen_t n_bytes;
    int fds[2], callers[2][CALLERS];
    char text[200];
    EXPECT(listen_alike(fds, at, &n_bytes));
    for (int round = 0; round < ROUNDS; round++) {
        test_case("round %d", round);
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < CALLERS; j++) callers[i][j] = caller(&at[i], n_bytes);
        EXPECT(wait_for(2, text, sizeof text) == 2);
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < CALLERS; j++) close(callers[i][j]);
        EXPECT(wait_for(0, text, sizeof text) == 0);
    }
    for (int i = 0; i < 2; i++) close(fds[i]);
}

TEST_API_MAIN({"addresses", test_addresses}, {"part of another", test_part_of_another})
