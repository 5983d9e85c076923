/* cuda_device.h: what backend.c asks of the CUDA backend before it has a context. */
#ifndef CUDA_DEVICE_H
#define CUDA_DEVICE_H

#include "gpt.h"

#ifdef __cplusplus
extern "C" {
#endif

/* GPT_OK where there is a GPU that this build can use; else a status with its sentence. */
int cuda_check(void);
/* gpt_cuda_info of gpt.h. */
int cuda_info(gpt_device_info *out);

#ifdef __cplusplus
}
#endif

#endif
