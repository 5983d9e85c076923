/* fork.h: tells a child process from its parent, whose threads and GPU it does not have. */
#ifndef GPT_FORK_H
#define GPT_FORK_H

/* Forks from which this process descends, since the first call in an ancestor. */
int fork_count(void);

#endif
