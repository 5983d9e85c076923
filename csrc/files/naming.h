/* naming.h: the tensors of a model.safetensors in which a parameter is stored, as
 * python/gptc/formats/hf.py names them: Hugging Face's names for a GPT-2 or a
 * family like Llama, else ours. */
#ifndef GPT_NAMING_H
#define GPT_NAMING_H

#include "gpt.h"

#include <stdbool.h>

/* How a folder names its tensors: as its model_type says. */
enum naming { NAMES_OURS, NAMES_GPT2, NAMES_LLAMA };

/* A tensor of the file, and the rows of our parameter that it holds. */
typedef struct part {
    char name[128];
    int64_t first_row, n_rows;
    bool transposed; /* stored as (in, out) */
} part;

enum { MAX_PARTS = 3 };

/* The names of the embedding and of an output head, which may be the same matrix. */
const char *naming_embedding(enum naming names);
#define NAMING_HEAD "lm_head.weight"

/* A name as files may have it that hold the bare transformer: without its first part; else NULL. */
const char *naming_without_prefix(const char *name);
/* Whether a file may hold this tensor without a parameter for it: tables that are computed. */
bool naming_ignores(const char *name);

/* Returns their number. */
int naming_parts(enum naming names, const gpt_config *c, const gpt_param *param,
                 part out[MAX_PARTS]);

#endif
