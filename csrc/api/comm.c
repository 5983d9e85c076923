/* comm.c: the ranks of a job, and their calls. */
#include "api.h"
#include "comm/background.h"
#include "comm/nccl.h"

#include <math.h>
#include <string.h>

static int check_timeout(double timeout_s) {
    if (timeout_s >= 0 && isfinite(timeout_s)) return GPT_OK;
    return fail(GPT_ERR_ARGUMENT, "the timeout is %g s; it must be 0 (none) or above", timeout_s);
}

int gpt_comm_create(int kind, const char *library, double timeout_s, gpt_comm **out) {
    REQUIRE(out);
    TRY(check_timeout(timeout_s));
    if (kind == GPT_COMM_NONE) return comm_none(out);
    if (kind == GPT_COMM_MPI) return comm_mpi(library, timeout_s, out);
    return fail(GPT_ERR_ARGUMENT, "unknown kind of ranks %d", kind);
}

int gpt_comm_connect(const int *sockets, int rank, int size, double timeout_s, gpt_comm **out) {
    REQUIRE(sockets);
    REQUIRE(out);
    TRY(check_timeout(timeout_s));
    if (size < 1 || rank < 0 || rank >= size)
        return fail(GPT_ERR_ARGUMENT, "rank %d is not one of %d ranks", rank, size);
    return comm_sockets(sockets, rank, size, timeout_s, out);
}

void gpt_comm_free(gpt_comm *comm) {
    if (!comm) return;
    if (comm->adding) drop_sums(comm->adding);
    background_stop(comm);
    nccl_close(comm);
    comm->ops->free(comm);
}

int gpt_comm_open_nccl(gpt_comm *comm, const char *library) {
    REQUIRE(comm);
    return nccl_open(comm, library);
}

int gpt_comm_join_gpus(gpt_comm *comm) {
    REQUIRE(comm);
    TRY(check_idle(comm));
    return nccl_join(comm);
}

int gpt_comm_rank(const gpt_comm *comm) {
    return comm ? comm->rank : -1;
}

int gpt_comm_size(const gpt_comm *comm) {
    return comm ? comm->size : 0;
}

const char *gpt_comm_host(const gpt_comm *comm, int rank) {
    return comm && rank >= 0 && rank < comm->size ? comm->hosts[rank] : "";
}

int gpt_comm_lost(const gpt_comm *comm, int rank) {
    return comm && rank >= 0 && rank < comm->size && comm->lost[rank];
}

int gpt_comm_set_timeout(gpt_comm *comm, double timeout_s) {
    REQUIRE(comm);
    TRY(check_timeout(timeout_s));
    comm->timeout_s = timeout_s;
    return GPT_OK;
}

int64_t gpt_comm_slice(const gpt_comm *comm, int64_t n, int rank) {
    return comm && n >= 0 && rank >= 0 ? comm_slice(comm, n, rank) : -1;
}

int check_idle(const gpt_comm *comm) {
    if (!background_is_busy(comm)) return GPT_OK;
    return fail(GPT_ERR_ARGUMENT, "gradients are being added; call gpt_model_all_reduce first");
}

static int check_numbers(const gpt_comm *comm, const float *x, int64_t n) {
    REQUIRE(comm);
    if (n < 0)
        return fail(GPT_ERR_ARGUMENT, "the count is %lld; it must be 0 or above", (long long)n);
    if (n > 0) REQUIRE(x);
    return check_idle(comm);
}

int check_wire(int wire) {
    if (wire >= GPT_WIRE_FP32 && wire <= GPT_WIRE_INT8) return GPT_OK;
    return fail(GPT_ERR_ARGUMENT, "unknown form of gradients %d", wire);
}

int gpt_comm_all_reduce(gpt_comm *comm, float *x, int64_t n) {
    TRY(check_numbers(comm, x, n));
    return comm->ops->all_reduce(comm, x, n, (coding){0});
}

int gpt_comm_all_reduce_coded(gpt_comm *comm, int wire, float *x, float *residual, int64_t n) {
    TRY(check_numbers(comm, x, n));
    TRY(check_wire(wire));
    if (wire != GPT_WIRE_FP32 && n > 0) REQUIRE(residual);
    return comm->ops->all_reduce(comm, x, n, (coding){wire, residual});
}

int gpt_comm_reduce_scatter(gpt_comm *comm, float *x, int64_t n) {
    TRY(check_numbers(comm, x, n));
    for (int rank = 0; rank <= comm->size; rank++) comm->bounds[rank] = comm_slice(comm, n, rank);
    return comm->ops->reduce_scatter(comm, x, comm->bounds, (coding){0});
}

static int check_parts(const gpt_comm *comm, const void *x, const int64_t *offsets) {
    REQUIRE(comm);
    REQUIRE(x);
    REQUIRE(offsets);
    for (int rank = 0; rank < comm->size; rank++)
        if (offsets[rank] < 0 || offsets[rank + 1] < offsets[rank])
            return fail(GPT_ERR_ARGUMENT, "the part of rank %d is bytes %lld to %lld", rank,
                        (long long)offsets[rank], (long long)offsets[rank + 1]);
    return check_idle(comm);
}

static int check_root(const gpt_comm *comm, int root) {
    if (root >= 0 && root < comm->size) return GPT_OK;
    return fail(GPT_ERR_ARGUMENT, "the root is rank %d; there are ranks 0 to %d", root,
                comm->size - 1);
}

int gpt_comm_all_gather(gpt_comm *comm, void *x, const int64_t *offsets) {
    TRY(check_parts(comm, x, offsets));
    return comm->ops->all_gather(comm, x, offsets);
}

int gpt_comm_scatter(gpt_comm *comm, void *x, const int64_t *offsets, int root) {
    TRY(check_parts(comm, x, offsets));
    TRY(check_root(comm, root));
    return comm->ops->scatter(comm, x, offsets, root);
}

int gpt_comm_gather(gpt_comm *comm, void *x, const int64_t *offsets, int root) {
    TRY(check_parts(comm, x, offsets));
    TRY(check_root(comm, root));
    return comm->ops->gather(comm, x, offsets, root);
}

int gpt_comm_broadcast(gpt_comm *comm, void *x, int64_t n_bytes, int root) {
    REQUIRE(comm);
    if (n_bytes < 0 || root < 0 || root >= comm->size)
        return fail(GPT_ERR_ARGUMENT, "%lld bytes of rank %d; there are ranks 0 to %d",
                    (long long)n_bytes, root, comm->size - 1);
    if (n_bytes > 0) REQUIRE(x);
    TRY(check_idle(comm));
    return comm->ops->broadcast(comm, x, n_bytes, root);
}

void gpt_comm_abort(gpt_comm *comm, int code) {
    if (!comm) return;
    /* MPI takes calls of one thread at a time. */
    if (background_is_busy(comm)) background_give_up(comm);
    comm->ops->end_job(comm, code);
}

int gpt_comm_sum_span(const gpt_comm *comm, int i, gpt_sum_span *out) {
    REQUIRE(comm);
    REQUIRE(out);
    return background_span(comm, i, out);
}
