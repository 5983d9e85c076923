#include "tensors.h"

#include "json.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_HEADER = 100000000 }; /* that of the safetensors library */
enum { MAX_DIMS = 8, CHUNK = 1 << 14 };

/* The dtypes of the format. Those without `decode` may be stored, such as masks, but are not weights. */
static float decode_f32(const unsigned char *x) {
    uint32_t bits = x[0] | (uint32_t)x[1] << 8 | (uint32_t)x[2] << 16 | (uint32_t)x[3] << 24;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float decode_bf16(const unsigned char *x) {
    return decode_f32((unsigned char[]){0, 0, x[0], x[1]});
}

static float decode_f16(const unsigned char *x) {
    uint32_t half = x[0] | (uint32_t)x[1] << 8;
    uint32_t sign = (half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
    if (exponent == 31) bits = sign | 0x7f800000 | fraction << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    if (exponent == 0) value = (sign ? -0x1p-24f : 0x1p-24f) * (float)fraction;
    return value;
}

static const struct {
    const char *name;
    int bytes;
    float (*decode)(const unsigned char *);
} dtypes[] = {
    {"F32", 4, decode_f32}, {"BF16", 2, decode_bf16}, {"F16", 2, decode_f16}, {"F64", 8, NULL},
    {"BOOL", 1, NULL},      {"F8_E4M3", 1, NULL},     {"F8_E5M2", 1, NULL},   {"I8", 1, NULL},
    {"U8", 1, NULL},        {"I16", 2, NULL},         {"U16", 2, NULL},       {"I32", 4, NULL},
    {"U32", 4, NULL},       {"I64", 8, NULL},         {"U64", 8, NULL},
};
enum { N_DTYPES = sizeof dtypes / sizeof *dtypes };

/* ---- the header ---- */

static int damaged(const tensor_file *t, const char *name, const char *why) {
    return fail(GPT_ERR_FILE, "%s has a damaged safetensors header: %s of %s",
                show_tail(t->file.path).text, why, show(name, strlen(name)).text);
}

static int read_dtype(const tensor_file *t, json_value entry, tensor *x) {
    json_value value;
    if (json_find(entry, "dtype", &value) == 1)
        for (int i = 0; i < N_DTYPES; i++) {
            if (!json_is(value, dtypes[i].name)) continue;
            x->dtype = (int16_t)i;
            return GPT_OK;
        }
    return damaged(t, x->name, "the dtype");
}

/* *bytes: what a tensor of this shape takes. */
static int read_shape(const tensor_file *t, json_value entry, tensor *x, int64_t *bytes) {
    json_value value, item, unused = {0};
    x->shape[0] = x->shape[1] = 1;
    *bytes = dtypes[x->dtype].bytes;
    if (json_find(entry, "shape", &value) != 1 || value.kind != JSON_ARRAY)
        return damaged(t, x->name, "the shape");
    bool zero = false;
    for (json_walk walk = json_inside(value); json_next(&walk, &unused, &item); x->n_dim++) {
        int64_t size;
        if (x->n_dim == MAX_DIMS || !json_int(item, 0, INT64_MAX, &size))
            return damaged(t, x->name, "the shape");
        if (x->n_dim < 2) x->shape[x->n_dim] = size;
        zero = zero || size == 0;
        /* Too large a shape may still have a zero in it. */
        if (__builtin_mul_overflow(*bytes, size ? size : 1, bytes)) *bytes = INT64_MAX;
    }
    if (zero) *bytes = 0;
    return GPT_OK;
}

static int read_offsets(const tensor_file *t, json_value entry, int64_t data, tensor *x) {
    json_value value, item, unused = {0};
    int64_t offsets[2], n = 0, room = t->file.size - data;
    if (json_find(entry, "data_offsets", &value) != 1 || value.kind != JSON_ARRAY)
        return damaged(t, x->name, "data_offsets");
    for (json_walk walk = json_inside(value); json_next(&walk, &unused, &item); n++)
        if (n == 2 || !json_int(item, 0, INT64_MAX, &offsets[n]))
            return damaged(t, x->name, "data_offsets");
    if (n != 2 || offsets[0] > offsets[1]) return damaged(t, x->name, "data_offsets");
    if (offsets[1] > room)
        return fail(GPT_ERR_FILE,
                    "%s is truncated: %s ends at byte %lld of its tensors, and there are %lld",
                    show_tail(t->file.path).text, show(x->name, strlen(x->name)).text,
                    (long long)offsets[1], (long long)room);
    x->begin = data + offsets[0];
    x->bytes = offsets[1] - offsets[0];
    return GPT_OK;
}

static int read_entry(const tensor_file *t, json_value entry, int64_t data, tensor *x) {
    int64_t bytes;
    if (entry.kind != JSON_OBJECT) return damaged(t, x->name, "the entry");
    TRY(read_dtype(t, entry, x));
    TRY(read_shape(t, entry, x, &bytes));
    TRY(read_offsets(t, entry, data, x));
    return x->bytes == bytes ? GPT_OK : damaged(t, x->name, "data_offsets do not fit the shape");
}

static int64_t count_members(json_value object) {
    json_walk walk = json_inside(object);
    json_value key, value;
    int64_t n = 0;
    while (json_next(&walk, &key, &value)) n++;
    return n;
}

static int read_entries(tensor_file *t, json_value header, int64_t data) {
    size_t room = (size_t)count_members(header) + 1;
    t->tensors = calloc(room, sizeof *t->tensors);
    t->names = malloc((size_t)(header.end - header.begin) + 1);
    if (!t->tensors || !t->names)
        return fail(GPT_ERR_MEMORY, "no memory for the tensors of %s",
                    show_tail(t->file.path).text);
    char *name = t->names;
    json_walk walk = json_inside(header);
    json_value key, entry;
    while (json_next(&walk, &key, &entry)) {
        if (json_is(key, "__metadata__")) continue;
        tensor *x = &t->tensors[t->n++];
        x->name = name;
        size_t n = json_string(key, name);
        if (n == 0 || strlen(name) != n) return damaged(t, name, "the name");
        name += n + 1;
        TRY(read_entry(t, entry, data, x));
    }
    return GPT_OK;
}

static int by_place(const void *one, const void *other) {
    const tensor *a = one, *b = other;
    if (a->begin != b->begin) return a->begin < b->begin ? -1 : 1;
    return a->bytes == b->bytes ? 0 : a->bytes < b->bytes ? -1 : 1;
}

static int by_name(const void *one, const void *other) {
    return strcmp(((const tensor *)one)->name, ((const tensor *)other)->name);
}

/* The tensors fill the file from the header's end to its own; each name is there once. */
static int check_entries(tensor_file *t, int64_t data) {
    int64_t end = data;
    qsort(t->tensors, (size_t)t->n, sizeof *t->tensors, by_place);
    for (int64_t i = 0; i < t->n; end += t->tensors[i++].bytes)
        if (t->tensors[i].begin != end)
            return damaged(t, t->tensors[i].name, "data_offsets leave a gap or overlap, those");
    if (end != t->file.size)
        return fail(GPT_ERR_FILE, "%s has %lld bytes after its last tensor",
                    show_tail(t->file.path).text, (long long)(t->file.size - end));
    qsort(t->tensors, (size_t)t->n, sizeof *t->tensors, by_name);
    for (int64_t i = 1; i < t->n; i++)
        if (!by_name(&t->tensors[i - 1], &t->tensors[i]))
            return damaged(t, t->tensors[i].name, "there are two entries, those");
    return GPT_OK;
}

static int read_header(tensor_file *t, const char *text, size_t length) {
    int64_t data = 8 + (int64_t)length;
    json_value header;
    TRY(json_parse(text, length, show_tail(t->file.path).text, &header));
    if (header.kind != JSON_OBJECT)
        return fail(GPT_ERR_FILE, "%s has a damaged safetensors header: not an object",
                    show_tail(t->file.path).text);
    TRY(read_entries(t, header, data));
    return check_entries(t, data);
}

static int open_header(tensor_file *t) {
    unsigned char bytes[8] = {0};
    uint64_t length = 0;
    if (t->file.size >= 8) TRY(file_read(&t->file, 0, bytes, 8));
    for (int i = 7; i >= 0; i--) length = length << 8 | bytes[i];
    if (t->file.size < 8 || length < 2 || length > MAX_HEADER ||
        length > (uint64_t)t->file.size - 8)
        return fail(
            GPT_ERR_FILE, "%s is not a whole safetensors file (%lld bytes, and a header of %llu)",
            show_tail(t->file.path).text, (long long)t->file.size, (unsigned long long)length);
    char *text;
    TRY(file_text(&t->file, 8, (size_t)length, &text));
    int status = read_header(t, text, (size_t)length);
    free(text);
    return status;
}

int tensors_open(const char *folder, const char *name, tensor_file *out) {
    *out = (tensor_file){.file.descriptor = -1};
    TRY(file_open(folder, name, &out->file));
    int status = open_header(out);
    if (status != GPT_OK) tensors_close(out);
    return status;
}

void tensors_close(tensor_file *t) {
    file_close(&t->file);
    free(t->tensors);
    free(t->names);
    *t = (tensor_file){.file.descriptor = -1};
}

/* ---- tensors ---- */

tensor *tensors_find(const tensor_file *t, const char *name) {
    return bsearch(&(tensor){.name = name}, t->tensors, (size_t)t->n, sizeof *t->tensors, by_name);
}

int tensors_readable(const tensor_file *t, const tensor *x) {
    if (dtypes[x->dtype].decode) return GPT_OK;
    return fail(GPT_ERR_FILE, "%s: %s is stored as %s; the weights must be F32, BF16 or F16",
                show_tail(t->file.path).text, show(x->name, strlen(x->name)).text,
                dtypes[x->dtype].name);
}

bool tensors_is_float32(const tensor *x) {
    return dtypes[x->dtype].decode == decode_f32;
}

int tensors_read(const tensor_file *t, const tensor *x, int64_t first, int64_t count, float *out) {
    unsigned char chunk[CHUNK];
    int bytes = dtypes[x->dtype].bytes;
    for (int64_t done = 0, n; done < count; done += n) {
        n = count - done < CHUNK / bytes ? count - done : CHUNK / bytes;
        TRY(file_read(&t->file, x->begin + (first + done) * bytes, chunk, (size_t)(n * bytes)));
        for (int64_t i = 0; i < n; i++) out[done + i] = dtypes[x->dtype].decode(chunk + i * bytes);
    }
    return GPT_OK;
}

int tensors_same(const tensor_file *t, const tensor *x, const tensor *y, bool *same) {
    unsigned char one[CHUNK], other[CHUNK];
    *same = x->dtype == y->dtype && x->n_dim == y->n_dim && x->bytes == y->bytes &&
            x->shape[0] == y->shape[0];
    for (int64_t done = 0, n; *same && done < x->bytes; done += n) {
        n = x->bytes - done < CHUNK ? x->bytes - done : CHUNK;
        TRY(file_read(&t->file, x->begin + done, one, (size_t)n));
        TRY(file_read(&t->file, y->begin + done, other, (size_t)n));
        *same = !memcmp(one, other, (size_t)n);
    }
    return GPT_OK;
}
