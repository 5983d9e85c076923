/* adapter.c: copies of a model's adapters, for the sequences of its sessions. */
#include "api.h"

#include <stdlib.h>

/* Copies the numbers, and with DoRA the gains, which products with the model's matrices give. */
static int copy_numbers(gpt_adapter *a) {
    gpt_model *m = a->model;
    size_t bytes = dora_workspace(m);
    void *workspace = bytes ? m->ops->buffer_alloc(m->ctx, bytes, BUFFER_WHOLE) : NULL;
    if (bytes && !workspace) {
        TRY(m->ops->sync(m->ctx));
        return fail(GPT_ERR_MEMORY, "no memory for the products of an adapter with DoRA");
    }
    if (bytes) {
        m->ops->ctx_set_workspace(m->ctx, workspace);
        model_pack(m);
        dora_measure(m);
    }
    adapter_copy(m, a);
    int status = m->ops->sync(m->ctx);
    if (bytes) m->ops->buffer_free(m->ctx, workspace, bytes);
    return status;
}

static int fill_adapter(gpt_adapter *a) {
    gpt_model *m = a->model;
    a->of = calloc((size_t)m->config.n_layer * LORA_MATRICES, sizeof *a->of);
    if (!a->of) return fail(GPT_ERR_MEMORY, "no memory for the adapter's tables");
    a->arena_bytes = adapter_plan(m, NULL, NULL);
    a->arena = m->ops->buffer_alloc(m->ctx, a->arena_bytes, BUFFER_WHOLE);
    if (!a->arena) {
        TRY(m->ops->sync(m->ctx));
        return fail(GPT_ERR_MEMORY, "no memory for an adapter's %zu bytes", a->arena_bytes);
    }
    adapter_plan(m, a->arena, a);
    return copy_numbers(a);
}

int gpt_adapter_create(gpt_model *model, int none, gpt_adapter **out) {
    REQUIRE_MODEL(model);
    REQUIRE(out);
    TRY(check_gathered(model));
    if (none != 0 && none != 1)
        return fail(GPT_ERR_ARGUMENT, "none is %d; it must be 0 or 1", none);
    if (!model->options.lora.rank)
        return fail(GPT_ERR_ARGUMENT,
                    "the model has no adapters: create it with a rank in gpt_options.lora");
    gpt_adapter *a = calloc(1, sizeof *a);
    if (!a) return fail(GPT_ERR_MEMORY, "no memory for the adapter");
    a->model = model;
    int status = none ? GPT_OK : fill_adapter(a);
    if (status != GPT_OK) {
        gpt_adapter_free(a);
        return status;
    }
    *out = a;
    return GPT_OK;
}

void gpt_adapter_free(gpt_adapter *a) {
    if (!a) return;
    if (a->arena && check_process(a->model) == GPT_OK)
        a->model->ops->buffer_free(a->model->ctx, a->arena, a->arena_bytes);
    free(a->of);
    free(a);
}
