/* graph.cu: sequences of ops as CUDA graphs, so that a small model's step is not bound by the starting
 * of its kernels. A sequence is run as usual the first time, which also loads its kernels, recorded
 * the second, and from then on run as a whole. */
#define CUDA_DTYPE any
#include "cuda.h"

#include "error.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_GRAPHS = 64 };

typedef struct recorded {
    int64_t key[GPT_REPLAY_KEY];
    int runs; /* before there was a graph */
    int refused;
    cudaGraphExec_t graph; /* NULL: none yet */
} recorded;

struct cuda_graphs {
    int n, next; /* next: which makes room for a new one */
    recorded all[MAX_GRAPHS];
    recorded *recording;
};

int cuda_graphs_open(cuda_graphs **out) {
    *out = (cuda_graphs *)calloc(1, sizeof **out);
    return *out ? GPT_OK : fail(GPT_ERR_MEMORY, "no memory for the table of graphs");
}

static void forget(recorded *r) {
    if (r->graph) cudaGraphExecDestroy(r->graph);
    memset(r, 0, sizeof *r);
}

void cuda_graphs_close(cuda_graphs *g) {
    if (!g) return;
    for (int i = 0; i < g->n; i++) forget(&g->all[i]);
    free(g);
}

static recorded *find(cuda_graphs *g, const int64_t *key, int n) {
    int64_t whole[GPT_REPLAY_KEY] = {};
    memcpy(whole, key, sizeof *key * (size_t)n);
    for (int i = 0; i < g->n; i++)
        if (!memcmp(g->all[i].key, whole, sizeof whole)) return &g->all[i];
    recorded *r = &g->all[g->n < MAX_GRAPHS ? g->n++ : g->next++ % MAX_GRAPHS];
    forget(r);
    memcpy(r->key, whole, sizeof whole);
    return r;
}

int cuda_replay_begin(gpt_ctx *ctx, const int64_t *key, int n) {
    recorded *r = find(ctx->graphs, key, n);
    if (r->graph) {
        cuda_remember(ctx, cudaGraphLaunch(r->graph, ctx->stream));
        return 1;
    }
    if (r->runs++ == 0 || r->refused || ctx->error != cudaSuccess) return 0;
    if (cudaStreamBeginCapture(ctx->stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess) {
        ctx->graphs->recording = r;
    } else {
        cudaGetLastError(); /* it is answered here */
        r->refused = 1;
    }
    return 0;
}

/* Recording runs nothing; what was recorded then runs, or where that fails the ops do, once more. */
int cuda_replay_end(gpt_ctx *ctx) {
    recorded *r = ctx->graphs->recording;
    if (!r) return 1;
    ctx->graphs->recording = NULL;
    cudaGraph_t graph = NULL;
    cudaError_t error = cudaStreamEndCapture(ctx->stream, &graph);
    if (error == cudaSuccess) error = ctx->error; /* an op could not be recorded */
    if (error == cudaSuccess) error = cudaGraphInstantiate(&r->graph, graph, 0);
    if (graph) cudaGraphDestroy(graph);
    if (error == cudaSuccess) error = cudaGraphLaunch(r->graph, ctx->stream);
    if (error == cudaSuccess) return 1;
    cudaGetLastError(); /* it is answered here */
    ctx->error = cudaSuccess;
    r->refused = 1;
    r->graph = NULL;
    return 0;
}
