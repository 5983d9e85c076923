/* emulate.cpp: blocks and fibers. A fiber is entered once with makecontext and from then on left and
 * resumed with setjmp and longjmp, which ask nothing of the kernel. */
#undef _FORTIFY_SOURCE
#include "emulate.h"

#include <setjmp.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <mutex>
#include <vector>

dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace {

enum {
    MAX_THREADS = 1024,
    MAX_WARPS = MAX_THREADS / EMULATED_LANES,
    MAX_GRID_YZ = 65535,
    STACK_BYTES = 128 << 10,
    MAX_SHARED_BYTES = 227 << 10,
};

/* A group of threads that wait for each other. */
struct barrier {
    int alive, arrived;
    long turn;
};

struct copy {
    void *to;
    const void *from;
    int group;
};

struct fiber {
    ucontext_t start;
    jmp_buf at;
    bool made, done;
    const barrier *waits; /* until its turn is over; NULL: it can go on */
    long turn;
    std::vector<copy> copies;
    int groups; /* committed so far */
};

struct warp_slots {
    unsigned char given[2][EMULATED_LANES * EMULATED_SLOT_BYTES];
    long turn;
};

fiber fibers[MAX_THREADS];
warp_slots slots[MAX_WARPS];
barrier block, warps[MAX_WARPS];
long turns[MAX_THREADS]; /* exchanges a lane has made */
ucontext_t scheduler_start;
jmp_buf scheduler;
int current;
long progress; /* counts arrivals, releases and ends */
const std::function<void()> *body;
unsigned char *stacks;
alignas(128) unsigned char shared[MAX_SHARED_BYTES];
bool reversed;
std::mutex device; /* one launch at a time, whoever starts it */

void give_way() {
    if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

void release_if_all(barrier &b) {
    if (b.alive && b.arrived == b.alive) {
        b.arrived = 0;
        b.turn++;
        progress++;
    }
}

void wait(barrier &b) {
    fiber &f = fibers[current];
    f.waits = &b;
    f.turn = b.turn;
    b.arrived++;
    progress++;
    release_if_all(b);
    if (b.turn == f.turn) give_way();
    f.waits = NULL;
}

void end_thread() {
    fiber &f = fibers[current];
    for (const copy &c : f.copies)
        (void)c, emulate_die("a thread ends before its copies have arrived");
    f.done = true;
    progress++;
    barrier &warp = warps[current / EMULATED_LANES];
    block.alive--, warp.alive--;
    if (warp.arrived) emulate_die("a lane ends while its warp works together");
    release_if_all(block);
}

/* A fiber runs one thread after another: making one costs system calls. */
void fiber_main() {
    for (;;) {
        (*body)();
        end_thread();
        give_way();
    }
}

void resume(int i) {
    current = i;
    threadIdx = dim3((unsigned)i);
    if (_setjmp(scheduler)) return;
    fiber &f = fibers[i];
    if (f.made) _longjmp(f.at, 1);
    f.made = true;
    getcontext(&f.start);
    f.start.uc_stack = {stacks + (size_t)i * STACK_BYTES, 0, STACK_BYTES};
    f.start.uc_link = NULL;
    makecontext(&f.start, fiber_main, 0);
    swapcontext(&scheduler_start, &f.start);
}

void run_block(int n_threads, size_t shared_bytes) {
    memset(shared, 0xff, shared_bytes);
    block = {n_threads, 0, 0};
    for (int w = 0; w * EMULATED_LANES < n_threads; w++) {
        int lanes = n_threads - w * EMULATED_LANES;
        warps[w] = {lanes < EMULATED_LANES ? lanes : EMULATED_LANES, 0, 0};
    }
    for (int i = 0; i < n_threads; i++) {
        fiber &f = fibers[i];
        f.done = false;
        f.waits = NULL;
        f.copies.clear();
        f.groups = 0;
        turns[i] = 0;
    }
    while (block.alive > 0) {
        long before = progress;
        for (int k = 0; k < n_threads; k++) {
            int i = reversed ? n_threads - 1 - k : k;
            const fiber &f = fibers[i];
            if (!f.done && !(f.waits && f.waits->turn == f.turn)) resume(i);
        }
        if (progress == before) emulate_die("the threads of a block wait for each other for ever");
    }
}

} // namespace

void emulate_die(const char *what) {
    fprintf(stderr, "emulated CUDA: %s (block %u %u %u, thread %d)\n", what, blockIdx.x, blockIdx.y,
            blockIdx.z, current);
    abort();
}

void emulate_launch(dim3 grid, int n_threads, size_t shared_bytes,
                    const std::function<void()> &run) {
    if (n_threads < 1 || n_threads > MAX_THREADS || shared_bytes > MAX_SHARED_BYTES || !grid.x ||
        !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > MAX_GRID_YZ || grid.z > MAX_GRID_YZ)
        emulate_die("a launch that no device accepts");
    std::lock_guard<std::mutex> lock(device);
    if (!stacks) {
        void *memory = mmap(NULL, (size_t)MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) emulate_die("no memory for stacks");
        stacks = (unsigned char *)memory;
    }
    body = &run;
    gridDim = grid;
    blockDim = dim3((unsigned)n_threads);
    reversed = !reversed;
    int64_t n_blocks = (int64_t)grid.x * grid.y * grid.z;
    for (int64_t k = 0; k < n_blocks; k++) {
        int64_t i = reversed ? n_blocks - 1 - k : k;
        blockIdx = dim3((unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y),
                        (unsigned)(i / grid.x / grid.y));
        run_block(n_threads, shared_bytes);
    }
}

void *emulate_shared_memory() {
    return shared;
}

void __syncthreads() {
    wait(block);
}

void __syncwarp() {
    wait(warps[current / EMULATED_LANES]);
}

const unsigned char *emulate_exchange(const void *mine, size_t bytes) {
    int w = current / EMULATED_LANES, lane = current % EMULATED_LANES;
    if (warps[w].alive < EMULATED_LANES && (int)blockDim.x - w * EMULATED_LANES >= EMULATED_LANES)
        emulate_die("a warp works together without all its lanes");
    /* Two sets in turn: a lane that is ahead cannot overwrite what another has yet to read. */
    unsigned char *given = slots[w].given[turns[current]++ % 2];
    if (bytes > EMULATED_SLOT_BYTES) emulate_die("an exchange of more than a slot");
    memcpy(given + lane * EMULATED_SLOT_BYTES, mine, bytes);
    wait(warps[w]);
    return given;
}

void emulate_copy_async(void *to, const void *from) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16) emulate_die("a misaligned asynchronous copy");
    fibers[current].copies.push_back({to, from, fibers[current].groups});
}

void emulate_copy_commit() {
    fibers[current].groups++;
}

void emulate_copy_wait(int n) {
    fiber &f = fibers[current];
    std::vector<copy> later;
    for (const copy &c : f.copies) {
        if (c.group >= f.groups - n) {
            later.push_back(c);
        } else if (c.from) {
            memcpy(c.to, c.from, 16);
        } else {
            memset(c.to, 0, 16);
        }
    }
    f.copies = later;
}

namespace {

float half_of(uint32_t pair, int high) {
    return __bfloat162float({(uint16_t)(high ? pair >> 16 : pair)});
}

} // namespace

/* Register i of a holds rows lane / 4 (+ 8 where i is odd) and columns lane % 4 * 2 (+ 8 where i > 1)
 * of a; register i of b holds rows lane % 4 * 2 (+ 8 for the second) and column lane / 4 of b. */
void emulate_multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const unsigned char *given = emulate_exchange(mine, sizeof mine);
    int lane = current % EMULATED_LANES;
    for (int e = 0; e < 4; e++) {
        int row = lane / 4, col = lane % 4 * 2 + e % 2;
        for (int k = 0; k < 16; k++) {
            uint32_t pair_a, pair_b;
            int from_a = row * 4 + k % 8 / 2, from_b = col * 4 + k % 8 / 2;
            memcpy(&pair_a, given + from_a * EMULATED_SLOT_BYTES + 4 * (e / 2 + k / 8 * 2),
                   sizeof pair_a);
            memcpy(&pair_b, given + from_b * EMULATED_SLOT_BYTES + 4 * (4 + k / 8), sizeof pair_b);
            d[e] += half_of(pair_a, k % 2) * half_of(pair_b, k % 2);
        }
    }
}

void emulate_load_matrices(uint32_t (&r)[4], const __nv_bfloat16 *row, bool transposed) {
    if ((uintptr_t)row % 16) emulate_die("a misaligned row of a matrix");
    const unsigned char *given = emulate_exchange(row, 16);
    int lane = current % EMULATED_LANES, i = lane / 4, j = lane % 4 * 2;
    for (int m = 0; m < 4; m++) {
        uint16_t pair[2];
        for (int k = 0; k < 2; k++) {
            int from = transposed ? j + k : i, at = transposed ? i : j + k;
            memcpy(&pair[k], given + (m * 8 + from) * EMULATED_SLOT_BYTES + 2 * at, 2);
        }
        r[m] = pair[0] | (uint32_t)pair[1] << 16;
    }
}

/* ---- pinned memory ---- */

namespace {

struct departure {
    const void *from;
    std::vector<unsigned char> bytes; /* as they were */
};

struct pinned_block {
    char *at;
    size_t bytes;
};

std::mutex pinned; /* models on several threads */
std::vector<pinned_block> pinned_blocks;
std::vector<departure> departures;
std::atomic<long> waits;

bool is_within(const void *p, const pinned_block &block) {
    return (const char *)p >= block.at && (const char *)p < block.at + block.bytes;
}

} // namespace

cudaError_t cudaMallocHost(void **out, size_t bytes) {
    std::lock_guard<std::mutex> lock(pinned);
    *out = calloc(1, bytes);
    if (!*out) return cudaErrorMemoryAllocation;
    pinned_blocks.push_back({(char *)*out, bytes});
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *p) {
    std::lock_guard<std::mutex> lock(pinned);
    std::erase_if(pinned_blocks, [=](const pinned_block &b) { return b.at == p; });
    free(p);
    return cudaSuccess;
}

void emulate_leave(const void *from, size_t bytes) {
    std::lock_guard<std::mutex> lock(pinned);
    const unsigned char *at = (const unsigned char *)from;
    for (const pinned_block &block : pinned_blocks)
        if (is_within(from, block)) departures.push_back({from, {at, at + bytes}});
}

/* Models have a stream each; to wait for one waits for all here, which finds less, and nothing that
 * is not there. */
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    std::lock_guard<std::mutex> lock(pinned);
    waits++;
    for (const departure &d : departures)
        if (memcmp(d.from, d.bytes.data(), d.bytes.size()))
            emulate_die("pinned memory was written while a copy was leaving it");
    departures.clear();
    return cudaSuccess;
}

long emulate_waits(void) {
    return waits;
}

/* ---- graphs: lists of what was asked for ---- */

struct emulated_graph {
    std::vector<std::function<void()>> all;
};

static thread_local emulated_graph *recording;
static long graph_launches;

void emulate_enqueue(const std::function<void()> &what) {
    if (recording)
        recording->all.push_back(what);
    else
        what();
}

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    recording = new emulated_graph;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *out) {
    *out = recording;
    recording = NULL;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long) {
    *out = new emulated_graph(*graph);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
    graph_launches++;
    for (const std::function<void()> &what : graph->all) what();
    return cudaSuccess;
}

long emulate_graph_launches(void) {
    return graph_launches;
}
