/* interrupt.h: the caller's wish to end a long computation, gpt_set_interrupt's. */
#ifndef GPT_INTERRUPT_H
#define GPT_INTERRUPT_H

#include <stdbool.h>

/* Asks the caller's function, if it has one and did not answer a moment ago. */
bool interrupt_wanted(void);

#endif
