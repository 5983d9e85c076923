/* A forked child computes with a model on a CPU, is refused one on a GPU, and ends. */
#define _GNU_SOURCE
#include "testing.h"

#include "models.h"

#include <dirent.h>
#include <sys/wait.h>
#include <unistd.h>

enum { T = 12, MOST_S = 20 };

/* Exit codes of the child. */
enum { AS_BEFORE, OTHER_STATUS, OTHER_NUMBERS, OTHER_THREADS };

static int count_threads(void) {
    int n = -2; /* "." and ".." */
    DIR *folder = opendir("/proc/self/task");
    while (folder && readdir(folder)) n++;
    if (folder) closedir(folder);
    return n;
}

/* Twice, so that a lock or a condition that threads of the parent wait on would be met. */
static int use_in_child(gpt_model *model, gpt_session *session, const int32_t *tokens,
                        const float *want, size_t bytes) {
    int refused = place.options.device != GPT_DEVICE_CPU, code = AS_BEFORE;
    int32_t seqs[T] = {0};
    float *got = malloc(bytes);
    for (int round = 0; round < 2 && code == AS_BEFORE; round++) {
        int status = gpt_model_logits(model, tokens, 1, T, got);
        if (status != (refused ? GPT_ERR_DEVICE : GPT_OK)) code = OTHER_STATUS;
        if (!refused && memcmp(got, want, bytes)) code = OTHER_NUMBERS;
        status = gpt_session_decode(session, tokens, seqs, NULL, T, got);
        if (status != (refused ? GPT_ERR_DEVICE : GPT_OK)) code = OTHER_STATUS;
        if (!refused && gpt_session_rewind(session, 0, 0)) code = OTHER_STATUS;
    }
    if (refused && !strstr(gpt_last_error(), "forked")) code = OTHER_STATUS;
    if (!refused && code == AS_BEFORE && count_threads() != place.options.n_threads)
        code = OTHER_THREADS;
    free(got);
    return code;
}

/* The exit code of a child that uses a model, or not, and frees it; -1 where a signal ended it. */
static int run_child(int uses, gpt_model *model, gpt_session *session, const int32_t *tokens,
                     const float *want, size_t bytes) {
    int status = -1;
    pid_t child = fork();
    if (child == 0) {
        alarm(MOST_S); /* ends a child that hangs */
        int code = uses ? use_in_child(model, session, tokens, want, bytes) : AS_BEFORE;
        gpt_session_free(session);
        gpt_model_free(model);
        _exit(code);
    }
    EXPECT(waitpid(child, &status, 0) == child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void test_fork(void) {
    EACH_PLACE {
        const gpt_config *c = &families[1].config;
        test_case("%s", families[1].name);
        gpt_model *model = new_model(c, 0, 1, T, 0);
        gpt_session *session;
        write_random_params(model, c);
        EXPECT_OK(gpt_session_create(model, 1, T, GPT_KV_ACTIVATIONS, &session));
        int32_t *tokens = random_ints(T, c->vocab_size);
        size_t bytes = sizeof(float) * T * (size_t)c->vocab_size;
        float *want = host_floats(T * c->vocab_size), *again = host_floats(T * c->vocab_size);
        EXPECT_OK(gpt_model_logits(model, tokens, 1, T, want));
        usleep(200000); /* by then the pool's threads sleep */
        for (int uses = 0; uses < 2; uses++)
            EXPECT(run_child(uses, model, session, tokens, want, bytes) == AS_BEFORE);
        EXPECT_OK(gpt_model_logits(model, tokens, 1, T, again));
        EXPECT(memcmp(again, want, bytes) == 0);
        gpt_session_free(session);
        gpt_model_free(model);
    }
}

TEST_API_MAIN({"fork", test_fork})
