/* emulate.cpp: blocks and fibers. */
#include "emulate.h"
#include "boxes.h"
#include "symbols.h"

#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <map>
#include <mutex>
#include <string>
#include <vector>

dim3 gridDim, blockDim, blockIdx, threadIdx;

#ifdef __x86_64__
/* Leaves one stack and continues on another. What a call must preserve is on the stacks. The return is the
 * one that the processor predicts, since all fibers wait in the same functions: after a longjmp it is not,
 * nor are those of the callers. */
extern "C" void emulate_change(void **from, void *to);
__asm__(".text\n"
        ".type emulate_change, @function\n"
        "emulate_change:\n"
        "    push %rbp\n"
        "    push %rbx\n"
        "    push %r12\n"
        "    push %r13\n"
        "    push %r14\n"
        "    push %r15\n"
        "    mov %rsp, (%rdi)\n"
        "    mov %rsi, %rsp\n"
        "    pop %r15\n"
        "    pop %r14\n"
        "    pop %r13\n"
        "    pop %r12\n"
        "    pop %rbx\n"
        "    pop %rbp\n"
        "    ret\n"
        ".size emulate_change, . - emulate_change\n");
#endif

namespace {

enum {
    MAX_THREADS = 1024,
    MAX_WARPS = MAX_THREADS / EMULATED_LANES,
    MAX_GRID_YZ = 65535,
    /* Spreads what a warp's stacks use over all sets of the cache. */
    STACK_BYTES = (128 << 10) + 39 * 64,
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
    size_t bytes;
};

/* A barrier of boxes, by its place in shared memory. */
struct box_barrier {
    int count, pending; /* arrivals of a phase, and those to come */
    int bytes;          /* bytes expected of the phase, less those that were asked for */
    barrier phase;      /* its turn; only waited for */
    std::vector<std::function<void()>> boxes,
        there; /* of this phase, and of the one that is over */
};

/* In code and on a stack. */
#ifdef __x86_64__
using place = void *; /* the top of the stack */
#else
using place = ucontext_t;
#endif

/* A stack, which runs one thread after another until one of them waits. */
struct fiber {
    place at;
};

/* A product of a warpgroup that is under way: what d will be, and what its matrices were. */
struct product {
    float *d;
    std::vector<float> result;
    uint64_t a, b;
    int n;
    bool transposed;
    uint64_t seen; /* one thread tells; the others have 0 */
    int group;
};

/* Few bytes, which a change of threads reads. */
struct thread {
    fiber *on;            /* NULL: it has not begun */
    const barrier *waits; /* until its turn is over; NULL: it can go on */
    long turn;
    bool done;
};

/* What a thread has under way. */
struct transfers {
    std::vector<copy> copies;
    std::vector<product> products;
    int product_groups;
    bool published; /* what it has copied into shared memory */
};

struct warp_slots {
    unsigned char given[2][EMULATED_LANES * EMULATED_SLOT_BYTES];
    float folded[2][EMULATED_LANES];
    long turn;
};

fiber fibers[MAX_THREADS];
int n_fibers; /* those that have been made */
fiber *idle[MAX_THREADS];
int n_idle;
thread threads[MAX_THREADS];
transfers under_way[MAX_THREADS];
int n_threads, n_begun; /* of this block */
warp_slots slots[MAX_WARPS];
barrier block, warps[MAX_WARPS];
std::map<uint64_t *, box_barrier> box_barriers;
long turns[MAX_THREADS]; /* exchanges a lane has made */
place scheduler;
int current;
long progress; /* counts arrivals, releases and ends */
const std::function<void()> *body;
unsigned char *stacks;
/* The block's shared memory, which ends where pages that nobody may touch begin. */
unsigned char *shared;
size_t shared_size;
bool reversed;
std::mutex device; /* one launch at a time, whoever starts it */

bool can_run(const thread &t) {
    return !t.done && !(t.waits && t.waits->turn == t.turn);
}

void run_as(int i) {
    current = i;
    threadIdx.x = (unsigned)i;
}

/* The next thread of the block, on a fiber that has none. */
void begin_next(fiber *on) {
    int i = reversed ? n_threads - 1 - n_begun : n_begun;
    n_begun++;
    threads[i].on = on;
    run_as(i);
}

/* Where thread i, which can run, continues. One that has not begun is the next to begin, and begins. */
place &place_of(int i) {
    thread &t = threads[i];
    if (t.on)
        run_as(i);
    else
        begin_next(idle[--n_idle]);
    return t.on->at;
}

/* The next thread of the warp, in the scheduler's order, that can go on; else the scheduler. */
place &next_place() {
    int first = current / EMULATED_LANES * EMULATED_LANES, last = first + EMULATED_LANES - 1;
    if (last > n_threads - 1) last = n_threads - 1;
    for (int i = current, n = first; n <= last; n++) {
        if (reversed)
            i = i == first ? last : i - 1;
        else
            i = i == last ? first : i + 1;
        if (can_run(threads[i])) return place_of(i);
    }
    return scheduler;
}

void change(place &from, place &to) {
#ifdef __x86_64__
    emulate_change(&from, to);
#else
    swapcontext(&from, &to);
#endif
}

void give_way(fiber &f) {
    change(f.at, next_place());
}

void release_if_all(barrier &b) {
    if (b.alive && b.arrived == b.alive) {
        b.arrived = 0;
        b.turn++;
        progress++;
    }
}

/* Inline: a change of threads reads one frame less on each stack. */
[[gnu::always_inline]] inline void wait(barrier &b) {
    thread &t = threads[current];
    t.waits = &b;
    t.turn = b.turn;
    b.arrived++;
    progress++;
    release_if_all(b);
    if (b.turn == t.turn) give_way(*t.on);
}

void end_thread() {
    const transfers &own = under_way[current];
    if (!own.copies.empty()) emulate_die("a thread ends before its copies have arrived");
    if (!own.products.empty()) emulate_die("a thread ends before its products are done");
    for (const auto &[place, b] : box_barriers)
        if (!b.boxes.empty() || !b.there.empty())
            emulate_die("a thread ends before its block's boxes have arrived");
    threads[current].done = true;
    progress++;
    barrier &warp = warps[current / EMULATED_LANES];
    block.alive--, warp.alive--;
    if (warp.arrived) emulate_die("a lane ends while its warp works together");
    release_if_all(block);
}

/* To begin the next thread here saves a kernel that never waits every change of stacks. */
void fiber_main() {
    for (;;) {
        fiber *self = threads[current].on;
        for (;;) {
            (*body)();
            end_thread();
            if (n_begun == n_threads) break;
            begin_next(self);
        }
        idle[n_idle++] = self;
        give_way(*self);
    }
}

/* It begins in fiber_main. */
void make_fiber() {
    unsigned char *stack = stacks + (size_t)n_fibers * STACK_BYTES;
    place &at = fibers[n_fibers].at;
#ifdef __x86_64__
    void **top =
        (void **)(stack + STACK_BYTES) - 2; /* at multiples of 16 when fiber_main is called */
    top[0] = (void *)fiber_main;
    at = top - 6;
#else
    getcontext(&at);
    at.uc_stack = {stack, 0, STACK_BYTES};
    makecontext(&at, fiber_main, 0);
#endif
}

void begin_block(int size) {
    memset(shared, 0xff, shared_size);
    n_threads = size, n_begun = 0;
    block = {n_threads, 0, 0};
    for (int w = 0; w * EMULATED_LANES < n_threads; w++) {
        int lanes = n_threads - w * EMULATED_LANES;
        warps[w] = {lanes < EMULATED_LANES ? lanes : EMULATED_LANES, 0, 0};
    }
    box_barriers.clear();
    for (; n_fibers < n_threads; n_fibers++) make_fiber();
    n_idle = 0;
    for (int i = 0; i < n_threads; i++) {
        idle[n_idle++] = &fibers[n_threads - 1 - i];
        threads[i] = {NULL, NULL, 0, false};
        under_way[i].copies.clear();
        under_way[i].products.clear();
        under_way[i].product_groups = 0;
        under_way[i].published = true;
        turns[i] = 0;
    }
}

/* A warp runs as far as it can before the next one does: its few stacks stay in the cache. */
void run_warp(int w) {
    int first = w * EMULATED_LANES, last = first + EMULATED_LANES;
    if (last > n_threads) last = n_threads;
    for (int k = first; k < last; k++) {
        int i = reversed ? first + last - 1 - k : k;
        if (!can_run(threads[i])) continue;
        change(scheduler, place_of(i));
        if (current / EMULATED_LANES == w) return; /* next_place found no other of this warp */
    }
}

void run_block(int size) {
    begin_block(size);
    int n_warps = (n_threads + EMULATED_LANES - 1) / EMULATED_LANES;
    while (block.alive > 0) {
        long before = progress;
        for (int w = 0; w < n_warps; w++) run_warp(reversed ? n_warps - 1 - w : w);
        if (progress == before) emulate_die("the threads of a block wait for each other for ever");
    }
}

} // namespace

void emulate_die(const char *what) {
    fprintf(stderr, "emulated CUDA: %s (block %u %u %u, thread %d)\n", what, blockIdx.x, blockIdx.y,
            blockIdx.z, current);
    abort();
}

unsigned char *emulate_pages(size_t bytes) {
    size_t page = 4096, whole = (bytes + page - 1) / page * page;
    void *memory = mmap(NULL, whole + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return NULL;
    mprotect((char *)memory + whole, page, PROT_NONE);
    return (unsigned char *)memory + whole;
}

static unsigned char *shared_end;

static void out_of_bounds(int) {
    emulate_die("an access past the end of shared memory or of an allocation");
}

void emulate_launch(dim3 grid, int size, size_t shared_bytes, const std::function<void()> &run) {
    if (size < 1 || size > MAX_THREADS || shared_bytes > MAX_SHARED_BYTES || !grid.x || !grid.y ||
        !grid.z || grid.x > 0x7fffffffu || grid.y > MAX_GRID_YZ || grid.z > MAX_GRID_YZ)
        emulate_die("a launch that no device accepts");
    std::lock_guard<std::mutex> lock(device);
    if (!stacks) {
        void *memory = mmap(NULL, (size_t)MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) emulate_die("no memory for stacks");
        stacks = (unsigned char *)memory;
    }
    if (!shared_end) {
        shared_end = emulate_pages(MAX_SHARED_BYTES);
        signal(SIGSEGV, out_of_bounds);
    }
    shared_size = (shared_bytes + 15) / 16 * 16;
    shared = shared_end - shared_size;
    body = &run;
    gridDim = grid;
    blockDim = dim3((unsigned)size);
    reversed = !reversed;
    int64_t n_blocks = (int64_t)grid.x * grid.y * grid.z;
    for (int64_t k = 0; k < n_blocks; k++) {
        int64_t i = reversed ? n_blocks - 1 - k : k;
        blockIdx = dim3((unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y),
                        (unsigned)(i / grid.x / grid.y));
        run_block(size);
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

static void want_all_lanes(int w) {
    if (warps[w].alive < EMULATED_LANES && (int)blockDim.x - w * EMULATED_LANES >= EMULATED_LANES)
        emulate_die("a warp works together without all its lanes");
}

const unsigned char *emulate_exchange(const void *mine, size_t bytes) {
    int w = current / EMULATED_LANES, lane = current % EMULATED_LANES;
    want_all_lanes(w);
    /* Two sets in turn: a lane that is ahead cannot overwrite what another has yet to read. */
    unsigned char *given = slots[w].given[turns[current]++ % 2];
    if (bytes > EMULATED_SLOT_BYTES) emulate_die("an exchange of more than a slot");
    if (bytes == 4)
        memcpy(given + lane * EMULATED_SLOT_BYTES, mine, 4);
    else
        memcpy(given + lane * EMULATED_SLOT_BYTES, mine, bytes);
    wait(warps[w]);
    return given;
}

/* As fmaxf, which the compiler would call. */
static inline float larger(float a, float b) {
    return a > b || b != b ? a : b;
}

/* Lanes that exchange their numbers have the same afterwards, of which one is computed: a + b is b + a. A function,
 * so that it needs no room on each stack. */
[[gnu::noinline]] static void fold_lanes(float *x, int from, int to, bool largest) {
    for (int offset = from; offset >= to; offset /= 2)
        for (int i = 0; i < EMULATED_LANES; i += 2 * offset)
            for (int k = i; k < i + offset; k++) {
                float a = x[k], b = x[k + offset];
                x[k] = x[k + offset] = largest ? larger(a, b) : a + b;
            }
}

float emulate_fold(float mine, int from, int to, bool largest) {
    int w = current / EMULATED_LANES, lane = current % EMULATED_LANES;
    want_all_lanes(w);
    float *x = slots[w].folded[turns[current]++ % 2]; /* two in turn, as above */
    x[lane] = mine;
    if (warps[w].arrived + 1 == warps[w].alive) fold_lanes(x, from, to, largest);
    wait(warps[w]);
    return x[lane];
}

void emulate_copy_async(void *to, const void *from, size_t bytes) {
    if ((uintptr_t)to % bytes || (uintptr_t)from % bytes)
        emulate_die("a misaligned asynchronous copy");
    under_way[current].copies.push_back({to, from, bytes});
}

void emulate_copy_wait() {
    transfers &t = under_way[current];
    for (const copy &c : t.copies) {
        if (c.bytes == 16) t.published = false; /* single floats are not for tensor cores */
        if (c.from)
            memcpy(c.to, c.from, c.bytes);
        else
            memset(c.to, 0, c.bytes);
    }
    t.copies.clear();
}

/* ---- boxes ---- */

namespace {

/* What boxes.cu has the driver make of a tensor. */
struct tensor {
    const unsigned char *at;
    uint64_t sizes[4], strides[3], rows; /* rows: of a box */
};
static_assert(sizeof(tensor) <= sizeof(box_map));

box_barrier &barrier_at(uint64_t *place) {
    auto found = box_barriers.find(place);
    if (found == box_barriers.end()) emulate_die("a barrier that nobody has set up");
    return found->second;
}

void end_phase(box_barrier &b) {
    if (b.pending || b.bytes) return;
    if (!b.there.empty())
        emulate_die("a second phase of a barrier, and nobody waited for the first");
    b.there.swap(b.boxes);
    b.pending = b.count;
    b.phase.turn++;
    progress++;
}

int encode_tensor(box_map *map, int type, uint32_t rank, void *address, const uint64_t *sizes,
                  const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int,
                  int swizzle, int, int) {
    bool good = type == 9 && rank == 4 && (uintptr_t)address % 16 == 0 && swizzle == 3;
    for (int i = 0; i < 4; i++)
        good = good && sizes[i] > 0 && sizes[i] <= 1ull << 32 && steps[i] == 1;
    for (int i = 0; i < 3; i++) good = good && strides[i] % 16 == 0 && strides[i] < 1ull << 40;
    if (!good || box[0] != BOX_COLS || box[1] != 1 || box[2] > 256 || box[3] != 1) return 1;
    tensor t = {(const unsigned char *)address, {}, {}, box[2]};
    memcpy(t.sizes, sizes, sizeof t.sizes);
    memcpy(t.strides, strides, sizeof t.strides);
    memcpy((void *)map, &t, sizeof t);
    return 0;
}

} // namespace

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult *) {
    if (strcmp(name, "cuTensorMapEncodeTiled")) emulate_die("no such function of the driver");
    *out = (void *)encode_tensor;
    return cudaSuccess;
}

void emulate_barrier_init(uint64_t *place, int count) {
    if ((uintptr_t)place % 8) emulate_die("a misaligned barrier");
    box_barriers[place] = {count, count, 0, {}, {}, {}};
}

void emulate_barrier_expect(uint64_t *place, int bytes) {
    barrier_at(place).bytes += bytes;
}

void emulate_barrier_arrive(uint64_t *place) {
    box_barrier &b = barrier_at(place);
    if (b.pending-- == 0) emulate_die("more arrivals at a barrier than it waits for");
    end_phase(b);
}

/* Boxes arrive when the first thread has waited for them. */
void emulate_barrier_wait(uint64_t *place, uint32_t parity) {
    thread &t = threads[current];
    box_barrier &b = barrier_at(place);
    if ((b.phase.turn & 1) == (long)parity) {
        t.waits = &b.phase;
        t.turn = b.phase.turn;
        give_way(*t.on);
        t.waits = NULL;
    }
    for (const auto &arrive : b.there) arrive();
    b.there.clear();
}

void emulate_copy_box(void *to, const box_map *map, int col, int head, int row, int b,
                      uint64_t *place) {
    tensor t;
    memcpy(&t, map, sizeof t);
    unsigned char *box = (unsigned char *)to;
    int bytes = (int)t.rows * BOX_COLS * 2;
    if ((box - shared) % 1024 || box < shared || box + bytes > shared + shared_size)
        emulate_die("a box that is not at a multiple of 1,024 bytes of shared memory");
    memset(box, 0xff, bytes);
    box_barrier &barrier = barrier_at(place);
    barrier.bytes -= bytes;
    barrier.boxes.push_back([=] {
        for (uint64_t r = 0; r < t.rows; r++)
            for (uint64_t c = 0; c < BOX_COLS; c++) {
                const uint64_t at[4] = {col + c, (uint64_t)head, row + r, (uint64_t)b};
                uint16_t x = 0;
                bool there = true;
                for (int i = 0; i < 4; i++) there = there && at[i] < t.sizes[i];
                if (there)
                    memcpy(&x,
                           t.at + 2 * at[0] + at[1] * t.strides[0] + at[2] * t.strides[1] +
                               at[3] * t.strides[2],
                           2);
                memcpy(box + r * 128 + ((c / 8 ^ r % 8) * 8 + c % 8) * 2, &x, 2);
            }
    });
    end_phase(barrier);
}

namespace {

/* Word i of the words that a lane gave. */
uint32_t word(const unsigned char *given, int lane, int i) {
    uint32_t x;
    memcpy(&x, given + lane * EMULATED_SLOT_BYTES + 4 * i, sizeof x);
    return x;
}

float low(uint32_t pair) {
    return __bfloat162float({(uint16_t)pair});
}

float high(uint32_t pair) {
    return __bfloat162float({(uint16_t)(pair >> 16)});
}

} // namespace

/* Register i of a holds rows lane / 4 (+ 8 where i is odd) and columns lane % 4 * 2 (+ 8 where i > 1)
 * of a; register i of b holds rows lane % 4 * 2 (+ 8 for the second) and column lane / 4 of b. */
void emulate_multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const unsigned char *given = emulate_exchange(mine, sizeof mine);
    int lane = current % EMULATED_LANES;
    for (int k = 0; k < 8; k++) { /* pairs of columns of a */
        int from_a = lane / 4 * 4 + k % 4, from_b = lane % 4 * 8 + k % 4;
        uint32_t row[2], col[2];
        for (int i = 0; i < 2; i++) {
            row[i] = word(given, from_a, i + k / 4 * 2);
            col[i] = word(given, from_b + 4 * i, 4 + k / 4);
        }
        for (int e = 0; e < 4; e++) {
            d[e] += low(row[e / 2]) * low(col[e % 2]);
            d[e] += high(row[e / 2]) * high(col[e % 2]);
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

/* ---- products of a warpgroup ---- */

namespace {

/* A number of a matrix, as instructions.h describes it: in row i, column j of those that are not
 * multiplied with each other where it is transposed, else the other way round. */
uint16_t number(uint64_t matrix, bool transposed, int i, int k) {
    uint32_t start = (uint32_t)(matrix & 0x3fff) << 4, panel = (uint32_t)(matrix >> 16 & 0x3fff)
                                                               << 4;
    uint32_t eight_rows = (uint32_t)(matrix >> 32 & 0x3fff) << 4;
    int row = transposed ? k : i, col = transposed ? i : k;
    uint32_t at = start + (uint32_t)(row / 8) * eight_rows + (uint32_t)(row % 8) * 128 +
                  (uint32_t)(col / 64) * panel + (uint32_t)(col % 64) * 2;
    at ^= (at >> 7 & 7) << 4;
    if (at + 2 > shared_size) emulate_die("a matrix outside shared memory");
    uint16_t bits;
    memcpy(&bits, shared + at, sizeof bits);
    return bits;
}

/* What both sides of a warp's product are, as numbers: rows of a, columns of b. */
float lefts[MAX_WARPS][2][16 * 16], rights[MAX_WARPS][2][16 * 128];

/* Tells whether the matrices of a product are as they were; not 0. */
uint64_t sum_of(const product &p, bool has_a) {
    uint64_t sum = 1;
    for (int k = 0; k < 16; k++) {
        for (int i = 0; i < 8 * p.n; i++) sum = sum * 31 + number(p.b, p.transposed, i, k);
        for (int i = 0; has_a && i < 64; i++) sum = sum * 31 + number(p.a, false, i, k);
    }
    return sum | 1;
}

} // namespace

void emulate_group_multiply(float *d, int n, const uint32_t *a, uint64_t a_matrix, uint64_t b,
                            bool transposed, bool add) {
    transfers &t = under_way[current];
    int lane = current % EMULATED_LANES, warp = current / EMULATED_LANES;
    if (blockDim.x % 128) emulate_die("a warpgroup's product without four warps");
    if (a_matrix >> 62 != !a || b >> 62 != 1) emulate_die("a matrix that is not swizzled");
    product p = {
        d, std::vector<float>(4 * (size_t)n), a_matrix, b, n, transposed, 0, t.product_groups};
    if (current % 128 == 0) {
        for (int i = 0; i < n_threads; i++)
            if (!under_way[i].published) emulate_die("a product of copies that were not published");
        p.seen = sum_of(p, !a);
    }
    /* The lanes share the reading of matrices. Two sets in turn, as in emulate_exchange. */
    float *left = lefts[warp][turns[current] % 2], *right = rights[warp][turns[current] % 2];
    for (int i = lane; i < 8 * n; i += EMULATED_LANES)
        for (int k = 0; k < 16; k++)
            right[16 * i + k] = __bfloat162float({number(b, transposed, i, k)});
    for (int i = lane; !a && i < 16; i += EMULATED_LANES)
        for (int k = 0; k < 16; k++)
            left[16 * i + k] = __bfloat162float({number(a_matrix, false, warp % 4 * 16 + i, k)});
    for (int r = 0; a && r < 4; r++) {
        float *pair = left + 16 * (lane / 4 + r % 2 * 8) + lane % 4 * 2 + r / 2 * 8;
        pair[0] = low(a[r]);
        pair[1] = high(a[r]);
    }
    emulate_exchange(&lane, sizeof lane);
    const float *before = d;
    for (const product &other : t.products)
        if (other.d == d) before = other.result.data();
    for (int i = 0; i < 4 * n; i++) {
        const float *row = left + 16 * (lane / 4 + i / 2 % 2 * 8);
        const float *col = right + 16 * (i / 4 * 8 + lane % 4 * 2 + i % 2);
        float sum = add ? before[i] : 0;
        for (int k = 0; k < 16; k++) sum += row[k] * col[k];
        p.result[(size_t)i] = sum;
    }
    for (int i = 0; i < 4 * n; i++) d[i] = NAN;
    t.products.push_back(p);
}

void emulate_group_commit() {
    under_way[current].product_groups++;
}

void emulate_group_wait(int n) {
    transfers &t = under_way[current];
    std::vector<product> later;
    for (const product &p : t.products) {
        if (p.group >= t.product_groups - n) {
            later.push_back(p);
            continue;
        }
        if (p.seen && p.seen != sum_of(p, p.a != 0))
            emulate_die("shared memory changes under a product");
        memcpy(p.d, p.result.data(), sizeof(float) * p.result.size());
    }
    t.products = later;
}

void emulate_group_publish() {
    under_way[current].published = true;
}

void emulate_capability(int major) {
    emulated_major = major;
}

/* ---- failures for tests ---- */

static std::string failing; /* the call */
static int calls_before;

void emulate_fail(const char *call, int after) {
    failing = call;
    calls_before = after;
}

static bool fails(const char *call) {
    if (failing != call || calls_before-- > 0) return false;
    failing.clear();
    return true;
}

/* ---- the device's memory ---- */

static std::mutex memory;
static std::map<void *, size_t> allocations; /* their bytes */

cudaError_t cudaMalloc(void **out, size_t bytes) {
    emulate_not_recorded("cudaMalloc");
    if (fails("cudaMalloc")) return cudaErrorLaunchFailure;
    std::lock_guard<std::mutex> lock(memory);
    bytes = (bytes + EMULATED_ALIGNMENT - 1) / EMULATED_ALIGNMENT * EMULATED_ALIGNMENT;
    if (bytes > EMULATED_BYTES - emulated_bytes_used) return cudaErrorMemoryAllocation;
    unsigned char *end = emulate_pages(bytes);
    if (!end) return cudaErrorMemoryAllocation;
    emulated_bytes_used += bytes;
    *out = end - bytes;
    allocations[*out] = bytes;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p) {
    emulate_not_recorded("cudaFree");
    std::lock_guard<std::mutex> lock(memory);
    auto found = allocations.find(p);
    if (!p || found == allocations.end()) return cudaSuccess;
    size_t bytes = found->second, page = 4096, whole = (bytes + page - 1) / page * page;
    munmap((char *)p + bytes - whole, whole + page);
    emulated_bytes_used -= bytes;
    allocations.erase(found);
    return cudaSuccess;
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
    emulate_not_recorded("cudaMallocHost");
    std::lock_guard<std::mutex> lock(pinned);
    *out = calloc(1, bytes);
    if (!*out) return cudaErrorMemoryAllocation;
    pinned_blocks.push_back({(char *)*out, bytes});
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *p) {
    emulate_not_recorded("cudaFreeHost");
    std::lock_guard<std::mutex> lock(pinned);
    std::erase_if(pinned_blocks, [=](const pinned_block &b) { return b.at == p; });
    free(p);
    return cudaSuccess;
}

/* Whether memory of the host is pinned. A copy from there is then under way. */
static bool leave(const void *from, size_t bytes) {
    std::lock_guard<std::mutex> lock(pinned);
    const unsigned char *at = (const unsigned char *)from;
    for (const pinned_block &block : pinned_blocks) {
        if (!is_within(from, block)) continue;
        departures.push_back({from, {at, at + bytes}});
        return true;
    }
    return false;
}

static bool is_pinned(const void *p) {
    std::lock_guard<std::mutex> lock(pinned);
    for (const pinned_block &block : pinned_blocks)
        if (is_within(p, block)) return true;
    return false;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
    static const char *const kinds[] = {"to the device", "to the host", "on the device"};
    char text[64];
    if (kind == cudaMemcpyHostToDevice && !leave(from, bytes))
        emulate_not_recorded("cudaMemcpyAsync from pageable memory");
    if (kind == cudaMemcpyDeviceToHost && !is_pinned(to))
        emulate_not_recorded("cudaMemcpyAsync to pageable memory");
    snprintf(text, sizeof text, "%zu %s", bytes, kinds[kind]);
    emulate_enqueue("copy", text, [=] { memcpy(to, from, bytes); });
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
    char text[32];
    snprintf(text, sizeof text, "%zu", bytes);
    emulate_enqueue("memset", text, [=] { memset(to, value, bytes); });
    return cudaSuccess;
}

/* Models have a stream each; to wait for one waits for all here, which finds less, and nothing that
 * is not there. */
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    emulate_not_recorded("cudaStreamSynchronize");
    if (fails("cudaStreamSynchronize")) return cudaErrorLaunchFailure;
    std::lock_guard<std::mutex> lock(pinned);
    waits++;
    for (const departure &d : departures)
        if (memcmp(d.from, d.bytes.data(), d.bytes.size()))
            emulate_die("pinned memory was written while a copy was leaving it");
    departures.clear();
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    emulate_not_recorded("cudaDeviceSynchronize");
    return cudaStreamSynchronize(NULL);
}

/* Every other question finds work under way. */
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    static std::atomic<unsigned> questions;
    emulate_not_recorded("cudaStreamQuery");
    if (questions++ % 2 == 0) return cudaErrorNotReady;
    return cudaStreamSynchronize(stream);
}

long emulate_waits(void) {
    return waits;
}

/* ---- events, of a clock that only products of the library move ---- */

struct emulated_event {
    double ms;
};

static double clock_ms;

void emulate_pass(float ms) {
    clock_ms += ms;
}

cudaError_t cudaEventCreate(cudaEvent_t *out) {
    *out = new emulated_event{0};
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
    event->ms = clock_ms;
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t) {
    emulate_not_recorded("cudaEventSynchronize");
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) {
    *ms = (float)(end->ms - begin->ms);
    return cudaSuccess;
}

/* ---- graphs: lists of what was asked for ---- */

struct node {
    const char *what;
    std::string on;
    std::function<void()> run;
    const void *kernel;
};

struct emulated_graph {
    std::vector<node> all;
};

static thread_local emulated_graph *recording;
static long graph_launches, graph_nodes;
static FILE *trace;

void emulate_trace(FILE *to) {
    trace = to;
    if (trace)
        fprintf(trace,
                "limits chunk_bytes=%zu multiprocessors=%d few_norm_rows=%d max_segments=%d\n",
                (size_t)CHUNK_BYTES, MULTIPROCESSORS, FEW_NORM_ROWS, MAX_SEGMENTS);
}

static void run(const node &n) {
    if (trace)
        fprintf(trace, "%s %s%s%s\n", n.what, n.kernel ? emulate_kernel_name(n.kernel).c_str() : "",
                n.kernel ? " " : "", n.on.c_str());
    n.run();
}

void emulate_enqueue(const char *what, const char *on, const std::function<void()> &work,
                     const void *kernel) {
    node n = {what, on, work, kernel};
    if (recording)
        recording->all.push_back(n);
    else
        run(n);
}

void emulate_not_recorded(const char *call) {
    char message[160];
    if (!recording) return;
    snprintf(message, sizeof message,
             "%s while a stream is being recorded (cudaErrorStreamCaptureUnsupported)", call);
    emulate_die(message);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) {
    *status = recording ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    emulate_not_recorded("cudaStreamBeginCapture");
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
    emulate_not_recorded("cudaGraphLaunch");
    graph_launches++;
    graph_nodes = (long)graph->all.size();
    if (trace) fprintf(trace, "graph %ld\n", graph_nodes);
    for (const node &n : graph->all) run(n);
    if (trace) fprintf(trace, "end\n");
    return cudaSuccess;
}

long emulate_graph_launches(void) {
    return graph_launches;
}

long emulate_graph_nodes(void) {
    return graph_nodes;
}
