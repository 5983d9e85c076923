/* error.h: how C code here fails. A function returns an enum gpt_status; the sentence is kept for
 * gpt_last_error(). Nothing in csrc/ prints, exits or aborts. */
#ifndef GPT_ERROR_H
#define GPT_ERROR_H

#include "gpt.h"

/* Remembers the sentence for this thread and returns status, so that callers write
 * `return fail(GPT_ERR_ARGUMENT, "n_head %d does not divide n_embd %d", ...)`. */
#ifdef __cplusplus
extern "C"
#endif
    int
    fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Leaves the function with the status of a call that failed. */
#define TRY(call)                                                                                  \
    do {                                                                                           \
        int status_ = (call);                                                                      \
        if (status_ != GPT_OK) return status_;                                                     \
    } while (0)

#endif
