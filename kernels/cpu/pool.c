#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define AC_PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define AC_PAUSE() __asm__ __volatile__("yield")
#else
#define AC_PAUSE() ((void)0)
#endif

/* Pauses before a waiting thread gives up its core (some 20 microseconds), and before an idle one sleeps. */
enum { SPIN_BARRIER = 1000, SPIN_IDLE = 2000 };

static struct {
    pthread_mutex_t exclusive; /* one region at a time */
    pthread_mutex_t mutex;     /* protects sleeping */
    pthread_cond_t wake;
    int workers; /* started so far; worker i is thread i + 1 of a region */
    ac_body body;
    void *context;
    int threads;
    atomic_uint generation; /* of the present region */
    atomic_int running;     /* workers that have not answered to it */
} pool = {.exclusive = PTHREAD_MUTEX_INITIALIZER, .mutex = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static _Alignas(64) atomic_int arrived;
static _Alignas(64) atomic_uint phase;
static _Thread_local int inside;

static void wait_a_little(int *spins) {
    if (++*spins < SPIN_BARRIER)
        AC_PAUSE();
    else
        sched_yield(); /* more threads than free cores: let the others get here */
}

void ac_barrier(int threads) {
    if (threads <= 1)
        return;
    unsigned now = atomic_load_explicit(&phase, memory_order_acquire);
    if (atomic_fetch_add_explicit(&arrived, 1, memory_order_acq_rel) + 1 == threads) {
        atomic_store_explicit(&arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&phase, now + 1, memory_order_release);
        return;
    }
    int spins = 0;
    while (atomic_load_explicit(&phase, memory_order_acquire) == now)
        wait_a_little(&spins);
}

static unsigned next_region(unsigned seen) {
    for (int i = 0; i < SPIN_IDLE; i++) {
        unsigned now = atomic_load_explicit(&pool.generation, memory_order_acquire);
        if (now != seen)
            return now;
        AC_PAUSE();
    }
    pthread_mutex_lock(&pool.mutex);
    while (atomic_load_explicit(&pool.generation, memory_order_acquire) == seen)
        pthread_cond_wait(&pool.wake, &pool.mutex);
    pthread_mutex_unlock(&pool.mutex);
    return atomic_load_explicit(&pool.generation, memory_order_acquire);
}

struct start {
    int thread;
    unsigned seen;
};
static struct start starts[AC_MAX_THREADS];

static void *worker(void *argument) {
    struct start *start = argument;
    unsigned seen = start->seen;
    inside = 1;
    for (;;) {
        seen = next_region(seen);
        /* Every worker answers to every region, also to one that needs fewer threads: no region can begin
         * while one of them still reads what belongs to the last. */
        if (start->thread < pool.threads)
            pool.body(pool.context, start->thread, pool.threads);
        atomic_fetch_sub_explicit(&pool.running, 1, memory_order_acq_rel);
    }
    return NULL;
}

/* After fork() only the calling thread exists: forget the workers and make locks afresh. */
static void forget_workers(void) {
    pthread_mutex_init(&pool.exclusive, NULL);
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.workers = 0;
    atomic_store(&arrived, 0);
    inside = 0;
}

static void register_fork_handler(void) { pthread_atfork(NULL, NULL, forget_workers); }

static int start_workers(int wanted) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_fork_handler);
    while (pool.workers < wanted) {
        pthread_t id;
        struct start *start = &starts[pool.workers];
        start->thread = pool.workers + 1;
        start->seen = atomic_load(&pool.generation);
        if (pthread_create(&id, NULL, worker, start))
            break;
        pthread_detach(id);
        pool.workers++;
    }
    return pool.workers;
}

void ac_region(int threads, ac_body body, void *context) {
    if (threads > AC_MAX_THREADS)
        threads = AC_MAX_THREADS;
    if (threads <= 1 || inside) {
        body(context, 0, 1);
        return;
    }
    pthread_mutex_lock(&pool.exclusive);
    int workers = start_workers(threads - 1);
    if (workers + 1 < threads)
        threads = workers + 1;
    pthread_mutex_lock(&pool.mutex);
    pool.body = body;
    pool.context = context;
    pool.threads = threads;
    atomic_store_explicit(&pool.running, workers, memory_order_relaxed);
    atomic_fetch_add_explicit(&pool.generation, 1, memory_order_release);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.mutex);
    inside = 1;
    body(context, 0, threads);
    inside = 0;
    int spins = 0;
    while (atomic_load_explicit(&pool.running, memory_order_acquire))
        wait_a_little(&spins);
    pthread_mutex_unlock(&pool.exclusive);
}
