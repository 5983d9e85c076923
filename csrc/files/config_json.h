/* config_json.h: the model that a config.json describes, as python/gptc/formats/hf.py reads and writes
 * it: one of Hugging Face's families, or "gptc" with our own fields for models of none. */
#ifndef GPT_CONFIG_JSON_H
#define GPT_CONFIG_JSON_H

#include "error.h"
#include "naming.h"

#include <stddef.h>

/* `where` is the file's name in errors; gpt_config_check has not seen the result yet. */
int config_from_json(const char *text, size_t n, const char *where, gpt_config *out,
                     enum naming *names);

#endif
