/* tensors.h: a safetensors file: an 8-byte little-endian length, that many bytes of JSON (name to dtype,
 * shape and offsets), and the tensors without gaps. https://github.com/huggingface/safetensors */
#ifndef GPT_TENSORS_H
#define GPT_TENSORS_H

#include "file.h"

#include <stdbool.h>

typedef struct tensor {
    const char *name;
    int64_t begin, bytes; /* in the file */
    int64_t shape[2];     /* of the first two axes; 1 past the last */
    int16_t n_dim;
    int16_t dtype; /* its index in the table of tensors.c */
    int32_t used;  /* for the caller; 0 at first */
} tensor;

typedef struct tensor_file {
    file file;
    tensor *tensors; /* (n), by name */
    char *names;
    int64_t n;
} tensor_file;

/* Reads and checks the header: every tensor is inside the file and has the bytes of its shape. */
int tensors_open(const char *folder, const char *name, tensor_file *out);
void tensors_close(tensor_file *t);

/* NULL where there is none. */
tensor *tensors_find(const tensor_file *t, const char *name);
/* GPT_ERR_FILE where a tensor's numbers are not of a dtype that tensors_read reads. */
int tensors_readable(const tensor_file *t, const tensor *x);
bool tensors_is_float32(const tensor *x);
/* Numbers first to first + count of a tensor that is readable, as float32. */
int tensors_read(const tensor_file *t, const tensor *x, int64_t first, int64_t count, float *out);
/* Whether two tensors are stored alike: dtype, shape and bytes. */
int tensors_same(const tensor_file *t, const tensor *x, const tensor *y, bool *same);

#endif
