/* test_faults.cpp: what CUDA would refuse or get wrong ends an emulated program, with a line that names it.
 * Each fault is planted in a process that is not this one. */
#define CUDA_DTYPE any
#define CUDA_BF16
#include "cublasLt.h"
#include "instructions.h"
#include "product.h"

#include <sys/wait.h>
#include <unistd.h>

#include <string>

static long n_checks, n_failed;
static gpt_ctx *ctx;
static char *device_memory; /* of the device */

/* ---- calls while a stream is recorded ---- */

static void record() {
    cudaStreamBeginCapture(ctx->stream, cudaStreamCaptureModeThreadLocal);
}

static void allocation() {
    void *p;
    record();
    cudaMalloc(&p, 16);
}
static void release() {
    record();
    cudaFree(device_memory);
}
static void pinned_allocation() {
    void *p;
    record();
    cudaMallocHost(&p, 16);
}
static void pinned_release() {
    void *p;
    cudaMallocHost(&p, 16);
    record();
    cudaFreeHost(p);
}
static void wait_for_stream() {
    record();
    cudaStreamSynchronize(ctx->stream);
}
static void wait_for_device() {
    record();
    cudaDeviceSynchronize();
}
static void wait_for_event() {
    cudaEvent_t event;
    cudaEventCreate(&event);
    record();
    cudaEventSynchronize(event);
}
static void upload_of_pageable_memory() {
    record();
    cudaMemcpyAsync(device_memory, &n_checks, sizeof n_checks, cudaMemcpyHostToDevice, ctx->stream);
}
static void download_to_pageable_memory() {
    record();
    cudaMemcpyAsync(&n_checks, device_memory, sizeof n_checks, cudaMemcpyDeviceToHost, ctx->stream);
}
static void large_upload() {
    static char host[16 << 20];
    record();
    cuda_upload(ctx, device_memory, host, sizeof host);
}
static void heuristic() {
    cublasLtMatmulHeuristicResult_t found;
    int n;
    record();
    cublasLtMatmulAlgoGetHeuristic(NULL, NULL, NULL, NULL, NULL, NULL, NULL, 1, &found, &n);
}
static void plan() {
    cublasLtMatmulDesc_t desc;
    record();
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
}
static void nested_graph() {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    record();
    cudaStreamEndCapture(ctx->stream, &graph);
    cudaGraphInstantiate(&exec, graph, 0);
    record();
    cudaGraphLaunch(exec, ctx->stream);
}

/* ---- vectors that are not aligned ---- */

static void load_kernel(float *to, const float *from) {
    float x[4];
    load(x, from);
    to[0] = x[0];
}
static void store_kernel(float *to) {
    float x[4] = {};
    store(to, x);
}
static void pack_kernel(elem *to, const elem *from) {
    float x[8];
    load(x, from);
    to[0] = from_float<elem>(x[0]);
}
static void copy_kernel(const char *from) {
    copy_async(shared_memory<char>(), from, true);
    copy_wait();
}
static void copy_to_kernel(const char *from) {
    copy_async(shared_memory<char>() + 8, from, true);
    copy_wait();
}
static void matrices_kernel() {
    uint32_t r[4];
    load_matrices(r, (const __nv_bfloat16 *)(shared_memory<char>() + 8));
}
static void misaligned_load() {
    launch(ctx, load_kernel, dim3(1), 1, 0, (float *)device_memory,
           (const float *)device_memory + 1);
}
static void misaligned_store() {
    launch(ctx, store_kernel, dim3(1), 1, 0, (float *)device_memory + 2);
}
static void misaligned_pack() {
    launch(ctx, pack_kernel, dim3(1), 1, 0, (elem *)device_memory, (const elem *)device_memory + 4);
}
static void misaligned_copy() {
    launch(ctx, copy_kernel, dim3(1), 1, 1024, device_memory + 4);
}
static void misaligned_copy_to() {
    launch(ctx, copy_to_kernel, dim3(1), 1, 1024, device_memory);
}
static void misaligned_matrices() {
    launch(ctx, matrices_kernel, dim3(1), 32, 1024);
}

/* ---- boxes whose barrier is misused ---- */

enum box_fault { BOX_FINE, NOT_AT_1024, NOT_WAITED_FOR, TOO_MUCH_EXPECTED, TWO_PHASES, NO_BARRIER };

/* A box of 8 rows, whose barrier is behind it. */
static void box_kernel(box_map map, int fault) {
    char *box = shared_memory<char>();
    uint64_t *barrier = (uint64_t *)(box + 2048);
    if (fault != NO_BARRIER) barrier_init(barrier, 1);
    barrier_expect(barrier, fault == TOO_MUCH_EXPECTED ? 2048 : 1024);
    copy_box(fault == NOT_AT_1024 ? box + 128 : box, &map, 0, 0, 0, 0, barrier);
    barrier_arrive(barrier);
    if (fault == TWO_PHASES) {
        barrier_arrive(barrier);
        barrier_wait(barrier, 1);
    } else if (fault != NOT_WAITED_FOR)
        barrier_wait(barrier, 0);
}
static void launch_box(box_fault fault) {
    box_map map = cuda_box_map(ctx, device_memory, 1, 8, 1, 64, 8);
    launch(ctx, box_kernel, dim3(1), 1, 4096, map, (int)fault);
}
static void fine_box() {
    launch_box(BOX_FINE);
    fprintf(stderr, "all is well");
    _exit(1);
}
static void misaligned_box() {
    launch_box(NOT_AT_1024);
}
static void box_nobody_waits_for() {
    launch_box(NOT_WAITED_FOR);
}
static void box_that_never_arrives() {
    launch_box(TOO_MUCH_EXPECTED);
}
static void box_of_an_earlier_phase() {
    launch_box(TWO_PHASES);
}
static void box_without_a_barrier() {
    launch_box(NO_BARRIER);
}
static void map_of_odd_rows() {
    cuda_box_map(ctx, device_memory, 1, 8, 1, 60, 8);
    fprintf(stderr, "%s", ctx->error == cudaErrorInvalidValue ? "refused" : "taken");
    _exit(1);
}

/* ---- sums and maxima of lanes, which the emulation takes at once ---- */

static const uint32_t special[] = {0x00000000, 0x80000000, 0x7fc00000, 0x7f800000, 0xff800000, 1};

/* fmaxf may take either zero. */
static bool is_same(float a, float b, bool zeros_are_one = false) {
    if (a != a || b != b) return a != a && b != b;
    return zeros_are_one ? a == b : !memcmp(&a, &b, sizeof a);
}

static void fold_kernel(uint32_t *differ) {
    uint32_t seed = threadIdx.x * 2654435761u + 1;
    for (uint32_t i = 0; i < 64; i++) {
        seed = seed * 1664525u + 1013904223u;
        uint32_t bits = (seed >> 16) % 8 ? (seed >> 2) + 0x20000000 : special[(seed >> 8) % 6];
        float x;
        memcpy(&x, &bits, sizeof x);
        if (i % 2 && x != x) x = 1; /* a NaN is all that would be left */
        *differ += !is_same(shuffled_sum<16, 1>(x), warp_sum(x));
        *differ += !is_same(shuffled_sum<8, 4>(x), (lanes_sum<8, 4>(x)));
        *differ += !is_same(shuffled_max<16, 1>(x), warp_max(x), true);
        *differ += !is_same(shuffled_max<16, 8>(x), (lanes_max<16, 8>(x)), true);
    }
}

/* The same bits as step by step, in every lane. */
static void check_folds() {
    for (int k = 0; k < 2; k++) {
        uint32_t differ = 0;
        launch(ctx, fold_kernel, dim3(2), 96, 0, &differ);
        n_checks++;
        if (!differ) continue;
        n_failed++;
        fprintf(stderr, "%u sums or maxima of lanes differ from those of shuffles\n", differ);
    }
}

/* ---- each fault in another process ---- */

/* What it says before it ends, which it has to do in a way that a test sees. */
static std::string fate_of(void (*fault)()) {
    int ends[2], status = 0;
    if (pipe(ends)) return "no pipe";
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        fault();
        _exit(0);
    }
    close(ends[1]);
    std::string said;
    char piece[256];
    for (ssize_t n; (n = read(ends[0], piece, sizeof piece)) > 0;) said.append(piece, (size_t)n);
    close(ends[0]);
    waitpid(child, &status, 0);
    return status ? said : "nothing: it ended as if all were well";
}

static void expect(const char *name, void (*fault)(), const char *words) {
    std::string said = fate_of(fault);
    n_checks++;
    if (said.find(words) != std::string::npos) return;
    n_failed++;
    fprintf(stderr, "%s: wanted \"%s\", got: %s\n", name, words, said.c_str());
}

/* A recording in which nothing is refused, and vectors that are aligned. */
static void harmless() {
    float *memory = (float *)device_memory;
    record();
    launch(ctx, load_kernel, dim3(1), 1, 0, memory, memory + 4);
    launch(ctx, store_kernel, dim3(1), 1, 0, memory + 4);
    cudaMemcpyAsync(memory, ctx->staging, 16, cudaMemcpyHostToDevice, ctx->stream);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaStreamEndCapture(ctx->stream, &graph);
    cudaGraphInstantiate(&exec, graph, 0);
    cudaGraphLaunch(exec, ctx->stream);
    fprintf(stderr, "all is well");
    _exit(1);
}

int main() {
    if (cuda_ctx_create(&ctx, 1, 0) != GPT_OK) return 1;
    device_memory = (char *)cuda_buffer_alloc(ctx, 32 << 20, BUFFER_WHOLE);
#define EXPECT(fault, words) expect(#fault, fault, words)
    check_folds();
    EXPECT(harmless, "all is well");
    EXPECT(allocation, "cudaMalloc while a stream is being recorded");
    EXPECT(release, "cudaFree while");
    EXPECT(pinned_allocation, "cudaMallocHost while");
    EXPECT(pinned_release, "cudaFreeHost while");
    EXPECT(wait_for_stream, "cudaStreamSynchronize while");
    EXPECT(wait_for_device, "cudaDeviceSynchronize while");
    EXPECT(wait_for_event, "cudaEventSynchronize while");
    EXPECT(upload_of_pageable_memory, "cudaMemcpyAsync from pageable memory while");
    EXPECT(download_to_pageable_memory, "cudaMemcpyAsync to pageable memory while");
    EXPECT(large_upload, "cudaMemcpyAsync from pageable memory while");
    EXPECT(heuristic, "cublasLtMatmulAlgoGetHeuristic while");
    EXPECT(plan, "cublasLtMatmulDescCreate while");
    EXPECT(nested_graph, "cudaGraphLaunch while");
    EXPECT(misaligned_load, "misaligned address");
    EXPECT(misaligned_store, "misaligned address");
    EXPECT(misaligned_pack, "misaligned address");
    EXPECT(misaligned_copy, "a misaligned asynchronous copy");
    EXPECT(misaligned_copy_to, "a misaligned asynchronous copy");
    EXPECT(misaligned_matrices, "a misaligned row of a matrix");
    EXPECT(fine_box, "all is well");
    EXPECT(misaligned_box, "a box that is not at a multiple of 1,024 bytes");
    EXPECT(box_nobody_waits_for, "before its block's boxes have arrived");
    EXPECT(box_that_never_arrives, "wait for each other for ever");
    EXPECT(box_of_an_earlier_phase, "nobody waited for the first");
    EXPECT(box_without_a_barrier, "a barrier that nobody has set up");
    EXPECT(map_of_odd_rows, "refused");
    printf("test_faults: %ld checks, %ld failed\n", n_checks, n_failed);
    return n_failed ? 1 : 0;
}
