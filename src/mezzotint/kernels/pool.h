// A pool of threads, without OpenMP.

#ifndef POOL_H
#define POOL_H

#include <stddef.h>

typedef void (*work)(void *job, ptrdiff_t unit, int thread);

#define MAX_THREADS 256

// Call work(job, unit, thread) for each unit below `units`, by at most `threads` threads, of which the caller is one
// (thread 0). Return when all are done. A call that is made while another one runs is executed by its caller alone.
void parallel(work function, void *job, ptrdiff_t units, int threads);

#endif
