/* tried.h: the addresses that this process tries to reach. An MPI library does not tell: without an answer it waits
 * for as long as the system does, which is minutes. */
#ifndef GPT_TRIED_H
#define GPT_TRIED_H

#include <stddef.h>

/* Writes the other ends of this process's TCP sockets that have no answer yet, as "10.0.0.2:1024, [fe80::1]:1024",
 * each of them once, as many as fit into `bytes`; "" where there is none, or the system does not tell. Returns their
 * number. */
int addresses_tried(char *text, size_t bytes);

#endif
