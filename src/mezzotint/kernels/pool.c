#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>

static pthread_mutex_t callers = PTHREAD_MUTEX_INITIALIZER;  // one call has the pool
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;     // of what follows
static pthread_cond_t begun = PTHREAD_COND_INITIALIZER, ended = PTHREAD_COND_INITIALIZER;
static int started, wanted, working;  // helpers: that exist, that this call may have, that are at work
static unsigned long turn;            // number of the call

static struct {
    work function;
    void *job;
    ptrdiff_t units;
    atomic_ptrdiff_t next;
} call;

static void take_units(int thread)
{
    for (ptrdiff_t unit; (unit = atomic_fetch_add(&call.next, 1)) < call.units;) call.function(call.job, unit, thread);
}

static void *help(void *number)
{
    int thread = (int)(ptrdiff_t)number;
    unsigned long seen = 0;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (seen == turn || thread > wanted) {
            seen = turn;
            pthread_cond_wait(&begun, &lock);
        }
        seen = turn;
        working++;
        pthread_mutex_unlock(&lock);
        take_units(thread);
        pthread_mutex_lock(&lock);
        if (--working == 0) pthread_cond_signal(&ended);
    }
    return NULL;
}

static void forget(void)  // a forked child has no helpers
{
    pthread_mutex_init(&callers, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&begun, NULL);
    pthread_cond_init(&ended, NULL);
    started = wanted = working = 0;
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget); }

void parallel(work function, void *job, ptrdiff_t units, int threads)
{
    if (threads > units) threads = (int)units;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads < 2 || pthread_mutex_trylock(&callers)) {
        for (ptrdiff_t unit = 0; unit < units; unit++) function(job, unit, 0);
        return;
    }
    pthread_mutex_lock(&lock);
    call.function = function;
    call.job = job;
    call.units = units;
    atomic_store(&call.next, 0);
    for (pthread_t id; started < threads - 1; started++) {
        if (pthread_create(&id, NULL, help, (void *)(ptrdiff_t)(started + 1))) break;
        pthread_detach(id);
    }
    wanted = threads - 1;
    turn++;
    pthread_cond_broadcast(&begun);
    pthread_mutex_unlock(&lock);
    take_units(0);
    pthread_mutex_lock(&lock);
    wanted = 0;  // who has not begun need not
    while (working) pthread_cond_wait(&ended, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&callers);
}

// Return the SHA-256 of the sources that the library was compiled from.
const char *sources(void) { return SOURCES; }
