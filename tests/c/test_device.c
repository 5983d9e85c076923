/* The CUDA device as gpt.h shows it: what it is, or one sentence for why there is none; and a model
 * that is too large for it. */
#include "models.h"

static const gpt_config *const config = &families[0].config;

static gpt_options cuda_options(int dtype, int max_batch) {
    return (gpt_options){
        .device = GPT_DEVICE_CUDA, .dtype = dtype, .training = 1, .max_batch = max_batch};
}

static int create_and_free(const gpt_options *options) {
    gpt_model *model = NULL;
    int status = gpt_model_create(config, options, &model);
    EXPECT((status == GPT_OK) == (model != NULL));
    gpt_model_free(model);
    return status;
}

/* gpt_cuda_info works exactly where models do; what is missing is said in one line. */
static void test_info(void) {
    gpt_device_info info;
    gpt_options options = cuda_options(GPT_DTYPE_FP32, 1);
    memset(&info, 0xff, sizeof info);
    int status = gpt_cuda_info(&info);
    if (status == GPT_OK) {
        EXPECT(info.name[0] && info.products[0]);
        EXPECT(10 * info.major + info.minor >= 80 && info.multiprocessors > 0);
        EXPECT(info.driver >= info.runtime && info.runtime >= 12000);
        EXPECT(info.free_bytes > 0 && info.free_bytes <= info.memory_bytes);
        EXPECT_OK(create_and_free(&options));
    } else {
        EXPECT(status == GPT_ERR_DEVICE);
        char sentence[512];
        snprintf(sentence, sizeof sentence, "%s", gpt_last_error());
        EXPECT(sentence[0] && !strchr(sentence, '\n') && !info.products[0]);
        EXPECT(create_and_free(&options) == GPT_ERR_DEVICE);
        EXPECT(strcmp(gpt_last_error(), sentence) == 0);
    }
    EXPECT(gpt_cuda_info(NULL) == GPT_ERR_ARGUMENT);
}

/* The batch that the error names fits; twice as many do not. */
static void test_out_of_memory(void) {
    gpt_device_info info;
    if (gpt_cuda_info(&info) != GPT_OK) return; /* test_info has said what is missing */
    for (int dtype = GPT_DTYPE_FP32; dtype <= GPT_DTYPE_BF16; dtype++) {
        gpt_options options = cuda_options(dtype, (1 << 28) / config->block_size);
        EXPECT(create_and_free(&options) == GPT_ERR_MEMORY);
        const char *named = strstr(gpt_last_error(), "the largest batch that fits is ");
        EXPECT(named != NULL);
        int batch = named ? atoi(strpbrk(named, "0123456789")) : 0;
        EXPECT(batch > 0 && batch < options.max_batch / 2);
        options.max_batch = batch;
        EXPECT_OK(create_and_free(&options));
        options.max_batch = 2 * batch;
        EXPECT(create_and_free(&options) == GPT_ERR_MEMORY);
    }
}

TEST_API_MAIN({"info", test_info}, {"out of memory", test_out_of_memory})
