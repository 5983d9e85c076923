/* load.c: the model in a checkpoint folder, from its config.json and model.safetensors. */
#include "api.h"
#include "files/config_json.h"
#include "files/naming.h"
#include "files/tensors.h"

#include <stdlib.h>
#include <string.h>

#define CONFIG  "config.json"
#define WEIGHTS "model.safetensors"

/* No config.json needs more. */
enum { MAX_CONFIG = 1 << 24, STRIP_ROWS = 32 };

/* ---- the folder ---- */

static int read_config(const char *folder, gpt_config *out, enum naming *names) {
    file f;
    char *text = NULL;
    TRY(file_open(folder, CONFIG, &f));
    int status = GPT_OK;
    shown name = show_tail(f.path);
    if (f.size > MAX_CONFIG)
        status = fail(GPT_ERR_FILE, "%s is too large for a config: %lld bytes", name.text,
                      (long long)f.size);
    if (status == GPT_OK) status = file_text(&f, 0, (size_t)f.size, &text);
    if (status == GPT_OK) status = config_from_json(text, (size_t)f.size, name.text, out, names);
    free(text);
    file_close(&f);
    TRY(status);
    if (gpt_config_check(out) == GPT_OK) return GPT_OK;
    shown why = show(gpt_last_error(), strlen(gpt_last_error()));
    return fail(GPT_ERR_FILE, "%s: %s", name.text, why.text);
}

/* A tensor by its name, or by that in a file of the bare transformer. */
static tensor *find_tensor(const tensor_file *t, const char *name) {
    tensor *found = tensors_find(t, name);
    const char *bare = naming_without_prefix(name);
    return found || !bare ? found : tensors_find(t, bare);
}

/* A head that is stored is not tied if it differs, whatever the config says: so do transformers. */
static int check_tied(const tensor_file *t, enum naming names, gpt_config *c) {
    bool same = true;
    tensor *embedding = find_tensor(t, naming_embedding(names)),
           *head = tensors_find(t, NAMING_HEAD);
    if (!c->tied || !embedding || !head) return GPT_OK;
    TRY(tensors_same(t, embedding, head, &same));
    c->tied = same;
    return GPT_OK;
}

/* The tensor of a part, which must have its shape. */
static int place(const tensor_file *t, enum naming names, const gpt_config *c,
                 const gpt_param *param, const part *p, tensor **out) {
    tensor *x = find_tensor(t, p->name);
    bool embedding = !strcmp(p->name, naming_embedding(names));
    if (!x && embedding && c->tied) x = tensors_find(t, NAMING_HEAD); /* under its other name */
    const char *path = t->file.path;
    if (!x) return fail(GPT_ERR_FILE, "%s lacks the tensor %s", show_tail(path).text, p->name);
    int64_t rows = p->transposed ? param->shape[1] : p->n_rows;
    int64_t cols = p->transposed ? p->n_rows : param->shape[1];
    if (x->n_dim != param->n_dim || x->shape[0] != rows || x->shape[1] != cols)
        return fail(GPT_ERR_FILE, "%s: %s does not have the shape (%lld, %lld) of its parameter",
                    show_tail(path).text, p->name, (long long)rows, (long long)cols);
    x->used = 1;
    *out = x;
    return tensors_readable(t, x);
}

/* Every parameter has its tensors, and every tensor its parameter. */
static int check_tensors(const tensor_file *t, enum naming names, const gpt_config *c) {
    part parts[MAX_PARTS];
    gpt_param param;
    tensor *x;
    for (int i = 0, n = gpt_config_param_count(c); i < n; i++) {
        TRY(gpt_config_param(c, i, &param));
        for (int k = 0, n_parts = naming_parts(names, c, &param, parts); k < n_parts; k++)
            TRY(place(t, names, c, &param, &parts[k], &x));
    }
    for (int64_t i = 0; i < t->n; i++) {
        const char *name = t->tensors[i].name;
        bool tied_head = c->tied && !strcmp(name, NAMING_HEAD);
        if (!t->tensors[i].used && !tied_head && !naming_ignores(name))
            return fail(GPT_ERR_FILE, "%s holds %s, which its model lacks",
                        show_tail(t->file.path).text, show(name, strlen(name)).text);
    }
    return GPT_OK;
}

/* The weights of other sorts of folders are those that Python reads: gptc export makes them one file. */
static int check_sort(const char *folder) {
    static const char *const others[] = {"model.safetensors.index.json", "pytorch_model.bin",
                                         "pytorch_model.bin.index.json", "model.gguf"};
    if (file_exists(folder, WEIGHTS)) return GPT_OK;
    for (int i = 0; i < 4; i++)
        if (file_exists(folder, others[i]))
            return fail(GPT_ERR_FILE,
                        "%s has %s and not " WEIGHTS ", which the C library reads: make that file "
                        "with gptc export -m FOLDER --to hf --out CKPT, and load CKPT",
                        show_tail(folder).text, others[i]);
    return GPT_OK;
}

static int open_folder(const char *folder, gpt_config *config, enum naming *names, tensor_file *t) {
    gpt_config c;
    TRY(read_config(folder, &c, names));
    TRY(check_sort(folder));
    TRY(tensors_open(folder, WEIGHTS, t));
    int status = check_tied(t, *names, &c);
    if (status == GPT_OK) status = check_tensors(t, *names, &c);
    if (status == GPT_OK)
        *config = c;
    else
        tensors_close(t);
    return status;
}

int gpt_config_load(const char *folder, gpt_config *out) {
    REQUIRE(folder);
    REQUIRE(out);
    tensor_file t;
    enum naming names;
    TRY(open_folder(folder, out, &names, &t));
    tensors_close(&t);
    return GPT_OK;
}

/* ---- the weights ---- */

/* values (n_rows, cols), from a tensor that is stored as (cols, n_rows), in strips of its rows. */
static int read_transposed(const tensor_file *t, const tensor *x, int64_t n_rows, int64_t cols,
                           float *values) {
    float *strip = malloc(sizeof(float) * STRIP_ROWS * (size_t)n_rows);
    if (!strip) return fail(GPT_ERR_MEMORY, "no memory to transpose %s", x->name);
    int status = GPT_OK;
    for (int64_t j = 0; j < cols && status == GPT_OK; j += STRIP_ROWS) {
        int64_t n = cols - j < STRIP_ROWS ? cols - j : STRIP_ROWS;
        status = tensors_read(t, x, j * n_rows, n * n_rows, strip);
        for (int64_t i = 0; i < n_rows && status == GPT_OK; i++)
            for (int64_t k = 0; k < n; k++) values[i * cols + j + k] = strip[k * n_rows + i];
    }
    free(strip);
    return status;
}

static int read_param(const tensor_file *t, enum naming names, const gpt_config *c,
                      const gpt_param *param, float *values) {
    part parts[MAX_PARTS];
    tensor *x;
    int64_t cols = param->shape[1];
    for (int k = 0, n = naming_parts(names, c, param, parts); k < n; k++) {
        const part *p = &parts[k];
        float *rows = values + p->first_row * cols;
        TRY(place(t, names, c, param, p, &x));
        if (p->transposed)
            TRY(read_transposed(t, x, p->n_rows, cols, rows));
        else
            TRY(tensors_read(t, x, 0, p->n_rows * cols, rows));
    }
    return GPT_OK;
}

/* A parameter that is one tensor in float32: it needs no copy on its way. */
static int read_in_place(const tensor_file *t, enum naming names, gpt_model *m, int i, bool *done) {
    part parts[MAX_PARTS];
    tensor *x;
    const gpt_param *param = &m->layout.slots[i].info;
    *done = false;
    if (naming_parts(names, &m->config, param, parts) > 1) return GPT_OK;
    TRY(place(t, names, &m->config, param, &parts[0], &x));
    if (!tensors_is_float32(x)) return GPT_OK;
    *done = true;
    int status =
        gpt_model_lend(m, i, param->size, t->file.descriptor, x->begin, parts[0].transposed, NULL);
    if (status != GPT_ERR_FILE) return status;
    shown why = show(gpt_last_error(), strlen(gpt_last_error()));
    return fail(GPT_ERR_FILE, "%s: %s", show_tail(t->file.path).text, why.text);
}

static int read_weights(const tensor_file *t, enum naming names, gpt_model *m) {
    int64_t most = 0;
    int status = GPT_OK;
    int n = params_count(&m->config); /* adapters follow, which the file does not have */
    for (int i = 0; i < n; i++)
        if (m->layout.slots[i].info.size > most) most = m->layout.slots[i].info.size;
    float *values = malloc(sizeof(float) * (size_t)most);
    if (!values) return fail(GPT_ERR_MEMORY, "no memory for the largest parameter");
    for (int i = 0; i < n && status == GPT_OK; i++) {
        const gpt_param *param = &m->layout.slots[i].info;
        bool done;
        status = read_in_place(t, names, m, i, &done);
        if (status == GPT_OK && !done) status = read_param(t, names, &m->config, param, values);
        if (status == GPT_OK && !done)
            status = gpt_model_write(m, i, GPT_TENSOR_VALUE, values, param->size);
    }
    free(values);
    return status;
}

int gpt_model_load(const char *folder, const gpt_options *options, gpt_model **out) {
    REQUIRE(folder);
    REQUIRE(options);
    REQUIRE(out);
    gpt_config config;
    gpt_model *m = NULL;
    tensor_file t;
    enum naming names;
    TRY(open_folder(folder, &config, &names, &t));
    int status = gpt_model_create(&config, options, &m);
    if (status == GPT_OK) status = read_weights(&t, names, m);
    if (status == GPT_OK && options->lora.rank) status = gpt_model_init_lora(m, options->seed);
    tensors_close(&t);
    if (status == GPT_OK)
        *out = m;
    else
        gpt_model_free(m);
    return status;
}
