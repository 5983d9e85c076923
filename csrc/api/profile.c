/* profile.c: measuring the machine, and where a model's time goes. */
#include "profile.h"

#include "api.h"

int gpt_model_peak(gpt_model *model, double *flops, double *bytes) {
    REQUIRE_MODEL(model);
    REQUIRE(flops);
    bool measured = model->ops->peak(model->ctx, flops, bytes);
    TRY(model->ops->sync(model->ctx));
    if (!measured) return fail(GPT_ERR_MEMORY, "no memory to measure memory with");
    return GPT_OK;
}

int gpt_model_profile(gpt_model *model, int on) {
    REQUIRE_MODEL(model);
    if (on < 0 || on > GPT_PROFILE_CHECKED)
        return fail(GPT_ERR_ARGUMENT, "on is %d; it must be 0, 1 or %d", on, GPT_PROFILE_CHECKED);
    if (model->profiled) profile_free(model->ctx, &model->ops, &model->ctx);
    model->profiled = false;
    if (on) {
        const int *layer = on == GPT_PROFILE_CHECKED ? &model->layer : NULL;
        TRY(profile_create(model->ops, model->ctx, layer, &model->ops, &model->ctx));
        model->profiled = true;
    }
    return GPT_OK;
}

int gpt_model_profile_read(const gpt_model *model, int i, gpt_op_time *out) {
    REQUIRE(model);
    REQUIRE(out);
    if (!model->profiled || !profile_read(model->ctx, i, out))
        return fail(GPT_ERR_ARGUMENT, "timed op %d does not exist", i);
    return GPT_OK;
}

int gpt_model_not_finite(const gpt_model *model, gpt_not_finite *out) {
    REQUIRE(model);
    REQUIRE(out);
    if (!model->profiled || !profile_not_finite(model->ctx, out))
        return fail(GPT_ERR_ARGUMENT, "no output of an op was checked and not finite");
    return GPT_OK;
}

int gpt_model_profile_product(const gpt_model *model, int i, gpt_product_time *out) {
    REQUIRE(model);
    REQUIRE(out);
    if (!model->profiled || !profile_product(model->ctx, i, out))
        return fail(GPT_ERR_ARGUMENT, "timed product %d does not exist", i);
    return GPT_OK;
}

int gpt_model_profile_busy(const gpt_model *model, int thread, double *seconds) {
    REQUIRE(model);
    REQUIRE(seconds);
    if (!model->profiled || thread < 0 || thread >= model->ops->ctx_threads(model->ctx))
        return fail(GPT_ERR_ARGUMENT, "timed thread %d does not exist", thread);
    *seconds = model->ops->ctx_busy_seconds(model->ctx, thread);
    return GPT_OK;
}
