// After each of torch's operators its OpenMP threads spin for a while. Threads of our own would compete with them for the
// processors, so the work is given to the same threads, through the function that compilers call for a parallel region.

#include "parallel.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

typedef void (*region)(void (*function)(void *), void *data, unsigned threads, unsigned flags);  // GOMP_parallel

static region openmp;
static atomic_bool has_threads;  // of this runtime in this process, which a fork does not copy
static bool is_fork;

typedef struct {
    work function;
    void *job;
    ptrdiff_t units;
    atomic_ptrdiff_t next;  // unit
    atomic_int threads;     // that have begun
} Call;

static void take_units(void *given)
{
    Call *call = given;
    int thread = atomic_fetch_add(&call->threads, 1);
    for (ptrdiff_t unit; (unit = atomic_fetch_add(&call->next, 1)) < call->units;) call->function(call->job, unit, thread);
}

void parallel(work function, void *job, ptrdiff_t units, int threads)
{
    Call call = {.function = function, .job = job, .units = units};
    if (threads > units) threads = (int)units;
    if (threads < 2 || is_fork) {
        take_units(&call);
        return;
    }
    has_threads = true;
    openmp(take_units, &call, (unsigned)threads, 0);
}

static void after_fork(void) { is_fork = is_fork || has_threads; }  // the runtime would wait for threads that are not there

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, after_fork); }

// Set the runtime's GOMP_parallel; call this first.
void use_openmp(void *function) { openmp = (region)function; }

// Return the SHA-256 of the sources that the library was compiled from.
const char *sources(void) { return SOURCES; }
