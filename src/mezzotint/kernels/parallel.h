// Loops over several threads, those of torch's OpenMP runtime.

#ifndef PARALLEL_H
#define PARALLEL_H

#include <stddef.h>

typedef void (*work)(void *job, ptrdiff_t unit, int thread);

// Call function(job, unit, thread) for each unit below `units`, by at most `threads` threads, of which the caller is one.
// Thread is below `threads`. Return when all are done.
void parallel(work function, void *job, ptrdiff_t units, int threads);

#endif
