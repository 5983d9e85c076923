/* plan_store.h: measured plans of products on disk, so that a shape is measured once for a card, a driver
 * and a version of cuBLASLt. */
#ifndef CUDA_PLAN_STORE_H
#define CUDA_PLAN_STORE_H

#include "product.h"

/* What cuBLASLt says of an algorithm, which it reads again in the same version. */
typedef struct stored_plan {
    product key;
    uint64_t algo[8];
    float ms; /* of its fastest run when it was chosen */
} stored_plan;

/* Plans hold for these alone, which are in the file's name and in its first line. */
typedef struct plan_circumstances {
    char card[128];
    int driver; /* the newest CUDA that it supports */
    size_t version;
    int tf32;
} plan_circumstances;

typedef struct plan_store plan_store;

/* Reads the plans of folder; NULL without memory. A file that is damaged, or of other circumstances, has
 * none, and is replaced by the first that is added. folder NULL: nothing is read or written. */
plan_store *plan_store_open(const char *folder, const plan_circumstances *where);
void plan_store_close(plan_store *store);
/* NULL: that shape has not been measured. */
const stored_plan *plan_store_find(const plan_store *store, const product &key);
/* Adds a plan, and writes the file as a whole, under another name first. */
void plan_store_add(plan_store *store, const stored_plan &plan);
/* The number of plans and their file, or why the file was not read, as text. */
void plan_store_describe(const plan_store *store, char *out, size_t size);

#endif
