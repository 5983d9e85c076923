/* api.h: what the files of api/ share. They are the C interface, gpt.h: every argument is validated
 * here, so that model/ and the ops cannot fail. */
#ifndef GPT_API_H
#define GPT_API_H

#include "error.h"
#include "model/model.h"

#define REQUIRE(pointer)                                                                           \
    do {                                                                                           \
        if (!(pointer)) return fail(GPT_ERR_ARGUMENT, "%s: " #pointer " is NULL", __func__);       \
    } while (0)

/* And of a process that may compute with it. */
#define REQUIRE_MODEL(model)                                                                       \
    do {                                                                                           \
        REQUIRE(model);                                                                            \
        TRY(check_process(model));                                                                 \
    } while (0)

/* The most tokens of a batch, or of a session. */
#define MAX_ROWS ((int64_t)1 << 28)

/* Whether each token is in the vocabulary, or at least `least`; `what` is its name in the error. */
int check_tokens(const gpt_model *m, const char *what, const int32_t *tokens, int64_t n,
                 int32_t least);

/* Whether the parameters of all parts of a sharded model are there. */
int check_gathered(const gpt_model *m);

/* Whether there are gradients, or why not. */
int check_trains(const gpt_model *m);

/* An enum gpt_wire. */
int check_wire(int wire);

/* Whether the calling thread may use comm. */
int check_idle(const gpt_comm *comm);

/* Gives up sums that gpt_model_all_reduce has not ended; ranks are apart then. */
void drop_sums(gpt_model *m);

/* Gradients and losses of no backward. */
int zero_grads(gpt_model *m);

/* GPT_ERR_DEVICE in a child of the process that made a model on a GPU. */
int check_process(const gpt_model *m);

/* GPT_ERR_INTERRUPTED where the computation stopped between two layers, from which the model is free
 * again. */
int check_interrupted(gpt_model *m);

#endif
