/* mpi.c: messages by an MPI library that is opened when ranks join, so that libgpt.so needs none.
 *
 * Nothing of mpi.h is compiled. Open MPI's handles are addresses of its objects, those of MPICH's ABI (MPICH,
 * Intel MPI, MVAPICH, Cray MPI) are numbers. Both fit into an intptr_t: an int is passed in the lower half of a
 * register, and is written to the lower half of a variable that was zero. */
#define _GNU_SOURCE
#include "error.h"
#include "links.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "an int handle would be in the other half"
#endif

enum { THREAD_SERIALIZED = 2, TAG = 7, ANSWER_BYTES = 8192, NAP_NS = 1000 * 1000 };

typedef intptr_t handle; /* MPI_Comm, MPI_Datatype, MPI_Errhandler */

typedef struct mpi {
    links links;
    void *library;
    handle world, own, byte;
    void *ignored; /* MPI_STATUS_IGNORE */
    bool initialised_here;
    int (*Initialized)(int *);
    int (*Finalized)(int *);
    int (*Init_thread)(int *, char ***, int, int *);
    int (*Finalize)(void);
    int (*Abort)(handle, int);
    int (*Comm_rank)(handle, int *);
    int (*Comm_size)(handle, int *);
    int (*Comm_idup)(handle, handle *, link_request *);
    int (*Comm_set_errhandler)(handle, handle);
    int (*Isend)(const void *, int, handle, int, int, handle, link_request *);
    int (*Irecv)(void *, int, handle, int, int, handle, link_request *);
    int (*Test)(link_request *, int *, void *);
    int (*Cancel)(link_request *);
    int (*Get_library_version)(char *, int *);
} mpi;

/* A function of the library, as an object that any pointer to a function can be copied from. */
static int find(const mpi *m, const char *name, void *function) {
    void *found = dlsym(m->library, name);
    if (!found) return fail(GPT_ERR_DEVICE, "the MPI library has no %s", name);
    memcpy(function, &found, sizeof found);
    return GPT_OK;
}

static int find_functions(mpi *m) {
    TRY(find(m, "MPI_Initialized", &m->Initialized));
    TRY(find(m, "MPI_Finalized", &m->Finalized));
    TRY(find(m, "MPI_Init_thread", &m->Init_thread));
    TRY(find(m, "MPI_Finalize", &m->Finalize));
    TRY(find(m, "MPI_Abort", &m->Abort));
    TRY(find(m, "MPI_Comm_rank", &m->Comm_rank));
    TRY(find(m, "MPI_Comm_size", &m->Comm_size));
    TRY(find(m, "MPI_Comm_idup", &m->Comm_idup));
    TRY(find(m, "MPI_Comm_set_errhandler", &m->Comm_set_errhandler));
    TRY(find(m, "MPI_Isend", &m->Isend));
    TRY(find(m, "MPI_Irecv", &m->Irecv));
    TRY(find(m, "MPI_Test", &m->Test));
    TRY(find(m, "MPI_Cancel", &m->Cancel));
    return find(m, "MPI_Get_library_version", &m->Get_library_version);
}

/* Open MPI ends the process with a page of text if srun has started it with --mpi=none, which is srun's default. */
static int check_slurm(void) {
    if (!getenv("SLURM_STEP_NUM_TASKS") || getenv("OMPI_COMM_WORLD_SIZE")) return GPT_OK;
    if (getenv("PMIX_RANK") || getenv("PMI_RANK")) return GPT_OK;
    return fail(GPT_ERR_DEVICE, "srun has not told Open MPI of the other ranks");
}

/* The constants of mpi.h, by the ABI; *errors is MPI_ERRORS_RETURN. */
static int find_constants(mpi *m, handle *errors) {
    char version[ANSWER_BYTES] = "";
    int length;
    void *world = dlsym(m->library, "ompi_mpi_comm_world");
    void *byte = dlsym(m->library, "ompi_mpi_byte");
    void *returns = dlsym(m->library, "ompi_mpi_errors_return");
    if (world && byte && returns) {
        m->world = (handle)world, m->byte = (handle)byte, *errors = (handle)returns;
        return check_slurm();
    }
    m->Get_library_version(version, &length);
    version[strcspn(version, "\n")] = 0;
    static const char *const names[] = {"MPICH", "Intel(R) MPI", "MVAPICH", "CRAY MPI"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strstr(version, names[i])) {
            m->world = 0x44000000, m->byte = 0x4c00010d, *errors = 0x54000001;
            m->ignored = (void *)1;
            return GPT_OK;
        }
    return fail(GPT_ERR_DEVICE, "the MPI library is neither Open MPI nor of MPICH's ABI: %.100s",
                version);
}

static int open_library(mpi *m, const char *name) {
    /* Open MPI 4 and 5, MPICH, and the name of a development package. */
    static const char *const usual[] = {"libmpi.so.40", "libmpi.so.12", "libmpich.so.12",
                                        "libmpi.so"};
    if (name) {
        m->library = dlopen(name, RTLD_NOW | RTLD_GLOBAL);
        if (!m->library) return fail(GPT_ERR_DEVICE, "%s does not load: %s", name, dlerror());
        return GPT_OK;
    }
    for (size_t i = 0; i < sizeof usual / sizeof *usual && !m->library; i++)
        m->library =
            dlopen(usual[i], RTLD_NOW | RTLD_GLOBAL); /* its plugins look for its symbols */
    if (!m->library) return fail(GPT_ERR_DEVICE, "no MPI library is installed");
    return GPT_OK;
}

/* ---- messages ---- */

static int check(int code, const char *call) {
    return code ? fail(GPT_ERR_COMM, "%s failed with MPI's error %d", call, code) : GPT_OK;
}

static int mpi_send(links *l, int rank, const void *data, int64_t n_bytes, link_request *out) {
    const mpi *m = (const mpi *)l;
    *out = 0;
    return check(m->Isend(data, (int)n_bytes, m->byte, rank, TAG, m->own, out), "MPI_Isend");
}

static int mpi_receive(links *l, int rank, void *data, int64_t n_bytes, link_request *out) {
    const mpi *m = (const mpi *)l;
    *out = 0;
    return check(m->Irecv(data, (int)n_bytes, m->byte, rank, TAG, m->own, out), "MPI_Irecv");
}

static int mpi_test(links *l, link_request *request, bool *done) {
    const mpi *m = (const mpi *)l;
    int flag = 0;
    TRY(check(m->Test(request, &flag, m->ignored), "MPI_Test"));
    *done = flag != 0;
    return GPT_OK;
}

static void mpi_cancel(links *l, link_request *request) {
    const mpi *m = (const mpi *)l;
    m->Cancel(request);
}

static void mpi_end_job(links *l, int code) {
    const mpi *m = (const mpi *)l;
    m->Abort(m->world, code);
}

/* The library stays open: it has threads, and may have started others. */
static void mpi_free(links *l) {
    mpi *m = (mpi *)l;
    int finalized = 1;
    if (m->initialised_here && !l->broken && !m->Finalized(&finalized) && !finalized) m->Finalize();
    free(m);
}

/* Messages of the program's own then have another communicator. Ranks that have not begun MPI before make no copy,
 * so that those that have would wait for them without limit. */
static int copy_world(mpi *m, double timeout_s) {
    double since = comm_seconds();
    link_request request = 0;
    bool done = false;
    TRY(check(m->Comm_idup(m->world, &m->own, &request), "MPI_Comm_idup"));
    for (;;) {
        TRY(mpi_test(&m->links, &request, &done));
        if (done) return GPT_OK;
        if (timeout_s > 0 && comm_seconds() - since > timeout_s) break;
        nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
    }
    m->links.broken = true;
    return fail(
        GPT_ERR_COMM,
        "not all ranks have come for %g s; all or none may have called MPI_Init before gptc",
        timeout_s);
}

static int join(mpi *m, handle errors, double timeout_s) {
    int before = 0, over = 0, provided;
    TRY(check(m->Finalized(&over), "MPI_Finalized"));
    if (over) return fail(GPT_ERR_ARGUMENT, "MPI has ended in this process: it can join only once");
    TRY(check(m->Initialized(&before), "MPI_Initialized"));
    if (!before) {
        TRY(check(m->Init_thread(NULL, NULL, THREAD_SERIALIZED, &provided), "MPI_Init_thread"));
        m->initialised_here = true;
    }
    TRY(check(m->Comm_set_errhandler(m->world, errors), "MPI_Comm_set_errhandler"));
    /* Nobody else sends messages then. */
    m->own = m->world;
    if (before) TRY(copy_world(m, timeout_s));
    TRY(check(m->Comm_rank(m->own, &m->links.rank), "MPI_Comm_rank"));
    return check(m->Comm_size(m->own, &m->links.size), "MPI_Comm_size");
}

int comm_mpi(const char *library, double timeout_s, gpt_comm **out) {
    static const link_ops ops = {mpi_send,   mpi_receive, mpi_test,
                                 mpi_cancel, mpi_end_job, mpi_free};
    handle errors = 0;
    mpi *m = calloc(1, sizeof *m);
    if (!m) return fail(GPT_ERR_MEMORY, "out of memory for the ranks of a job");
    m->links.ops = &ops;
    int status = open_library(m, library);
    if (status == GPT_OK) status = find_functions(m);
    if (status == GPT_OK) status = find_constants(m, &errors);
    if (status == GPT_OK) status = join(m, errors, timeout_s);
    if (status == GPT_OK) return comm_over_links(&m->links, timeout_s, out);
    mpi_free(&m->links);
    return status;
}
