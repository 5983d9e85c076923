/* plan_store.cu: a text file of plans: a line with the circumstances, a line for each plan, and a checksum
 * of all lines before it. */
#define CUDA_DTYPE any
#include "plan_store.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_STORED = 4096, HEADER_BYTES = 256, LINE_BYTES = 512, PATH_BYTES = 4096 };

struct plan_store {
    char path[PATH_BYTES]; /* empty: there is no folder */
    char header[HEADER_BYTES];
    const char *problem; /* why the file was not read, or written; NULL */
    int n;
    stored_plan plans[MAX_STORED];
};

static uint64_t checksum(const char *text, size_t n) { /* FNV-1a */
    uint64_t sum = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < n; i++) sum = (sum ^ (unsigned char)text[i]) * 0x100000001b3ull;
    return sum;
}

/* ---- a plan as a line ---- */

#define KEY_FIELDS(use)                                                                            \
    use(kind) use(epilogue) use(bf16) use(float_out) use(add) use(M) use(N) use(K) use(lda)        \
        use(ldb) use(ldo)
#define KEY_POINTERS(use) use(out) use(a) use(b) use(bias) use(pre) /* how they are aligned */

static int write_plan(char *line, size_t size, const stored_plan &plan) {
    int n = 0;
#define FIELD(name)   n += snprintf(line + n, size - (size_t)n, "%d ", plan.key.name);
#define POINTER(name) n += snprintf(line + n, size - (size_t)n, "%zu ", (size_t)plan.key.name);
    KEY_FIELDS(FIELD)
    KEY_POINTERS(POINTER)
#undef FIELD
#undef POINTER
    n += snprintf(line + n, size - (size_t)n, "%g", (double)plan.ms);
    for (uint64_t word : plan.algo)
        n += snprintf(line + n, size - (size_t)n, " %llx", (unsigned long long)word);
    return n + snprintf(line + n, size - (size_t)n, "\n");
}

/* Moves at past a plan. */
static bool read_plan(const char **at, stored_plan *plan) {
    char *end = NULL;
    bool good = true;
    auto whole = [&](int base) {
        unsigned long long x = strtoull(*at, &end, base);
        good = good && end != *at;
        *at = end;
        return x;
    };
#define FIELD(name)   plan->key.name = (int)whole(10);
#define POINTER(name) plan->key.name = (decltype(plan->key.name))(uintptr_t)whole(10);
    KEY_FIELDS(FIELD)
    KEY_POINTERS(POINTER)
#undef FIELD
#undef POINTER
    plan->ms = strtof(*at, &end);
    good = good && end != *at;
    *at = end;
    for (uint64_t &word : plan->algo) word = whole(16);
    return good && *(*at)++ == '\n';
}

/* ---- the file ---- */

/* Plans of the text, or the reason why there are none. */
static const char *parse(plan_store *s, const char *text, size_t n) {
    static const char damaged[] = "is damaged and was ignored";
    const char *last = n > 0 && text[n - 1] == '\n' ? text + n - 1 : NULL;
    while (last && last > text && last[-1] != '\n') last--;
    if (!last || last == text) return damaged;
    unsigned long long sum;
    if (sscanf(last, "sum %llx", &sum) != 1 || sum != checksum(text, (size_t)(last - text)))
        return damaged;
    size_t header = strlen(s->header);
    if ((size_t)(last - text) < header || memcmp(text, s->header, header))
        return "is of another version and was ignored";
    for (const char *at = text + header; at < last; s->n++)
        if (s->n == MAX_STORED || !read_plan(&at, &s->plans[s->n])) {
            s->n = 0;
            return damaged;
        }
    return NULL;
}

static void read_file(plan_store *s) {
    FILE *file = fopen(s->path, "rb");
    if (!file) return;
    size_t most = (size_t)MAX_STORED * LINE_BYTES;
    char *text = (char *)malloc(most + 1);
    size_t n = text ? fread(text, 1, most, file) : 0;
    fclose(file);
    if (text) {
        text[n] = 0;
        s->problem = parse(s, text, n);
    }
    free(text);
}

static bool write_text(FILE *file, const plan_store *s) {
    size_t most = HEADER_BYTES + (size_t)(s->n + 1) * LINE_BYTES;
    char *text = (char *)malloc(most);
    if (!text) return false;
    int n = snprintf(text, most, "%s", s->header);
    for (int i = 0; i < s->n; i++) n += write_plan(text + n, LINE_BYTES, s->plans[i]);
    n += snprintf(text + n, most - (size_t)n, "sum %llx\n",
                  (unsigned long long)checksum(text, (size_t)n));
    bool good = fwrite(text, 1, (size_t)n, file) == (size_t)n && fflush(file) == 0 &&
                fsync(fileno(file)) == 0;
    free(text);
    return good;
}

static void write_file(plan_store *s) {
    char part[PATH_BYTES + 32];
    snprintf(part, sizeof part, "%s.%ld", s->path, (long)getpid());
    FILE *file = fopen(part, "wb");
    bool good = file && write_text(file, s);
    if (file) good = fclose(file) == 0 && good;
    good = good && rename(part, s->path) == 0;
    if (!good && file) remove(part);
    s->problem = good ? NULL : "could not be written";
}

plan_store *plan_store_open(const char *folder, const plan_circumstances *where) {
    plan_store *s = (plan_store *)calloc(1, sizeof *s);
    if (!s) return NULL;
    snprintf(s->header, sizeof s->header, "gptc plans 1, %s, driver %d, cuBLASLt %zu, tf32 %d\n",
             where->card, where->driver, where->version, where->tf32);
    if (!folder || !*folder) return s;
    char card[sizeof where->card];
    for (size_t i = 0; i < sizeof card; i++)
        card[i] = isalnum((unsigned char)where->card[i]) || !where->card[i] ? where->card[i] : '_';
    mkdir(folder, 0777);
    int n = snprintf(s->path, sizeof s->path, "%s/%s-%d-%zu%s.plans", folder, card, where->driver,
                     where->version, where->tf32 ? "-tf32" : "");
    if (n >= (int)sizeof s->path) s->path[0] = 0;
    if (s->path[0]) read_file(s);
    return s;
}

void plan_store_close(plan_store *s) {
    free(s);
}

const stored_plan *plan_store_find(const plan_store *s, const product &key) {
    for (int i = 0; s && i < s->n; i++)
        if (s->plans[i].key == key) return &s->plans[i];
    return NULL;
}

void plan_store_add(plan_store *s, const stored_plan &plan) {
    if (!s) return;
    int i = 0;
    while (i < s->n && !(s->plans[i].key == plan.key)) i++;
    if (i == MAX_STORED) return;
    s->plans[i] = plan;
    if (i == s->n) s->n++;
    if (s->path[0]) write_file(s);
}

void plan_store_describe(const plan_store *s, char *out, size_t size) {
    if (!s || !s->path[0])
        snprintf(out, size, "plans are not kept (GPTC_PLANS names their folder)");
    else if (s->problem)
        snprintf(out, size, "%s %s", s->path, s->problem);
    else
        snprintf(out, size, "%d plans in %s", s->n, s->path);
}
