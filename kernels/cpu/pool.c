#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

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

/* The present region in one word, so that a worker enters the region that it sees or none:
 * generation (32 bits), threads (15), closed (1), workers that entered (16). */
typedef uint64_t gate_t;
enum { GENERATION = 32, THREADS = 17, CLOSED = 16 };
static unsigned generation_of(gate_t gate) { return (unsigned)(gate >> GENERATION); }
static int threads_of(gate_t gate) { return (int)(gate >> THREADS & 0x7fff); }
static int entered(gate_t gate) { return (int)(gate & 0xffff); }

static struct {
    pthread_mutex_t exclusive; /* one region at a time */
    pthread_mutex_t mutex;     /* protects sleeping */
    int workers; /* started so far; worker i is thread i + 1 of a region */
    ac_body body;
    void *context;
} pool = {.exclusive = PTHREAD_MUTEX_INITIALIZER, .mutex = PTHREAD_MUTEX_INITIALIZER};

static struct worker {
    int thread;
    unsigned seen; /* generation of the last region that it entered or found closed */
    int asleep;
    pthread_cond_t wake;
} workers[AC_MAX_THREADS];

static _Alignas(64) _Atomic gate_t gate;
static _Alignas(64) atomic_int left; /* workers that have left the region */
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

/* Whether the region is a new one and has a place for the worker. */
static int wanted(gate_t now, const struct worker *worker) {
    return generation_of(now) != worker->seen && worker->thread < threads_of(now);
}

/* Wait until a region wants the worker. */
static gate_t next_region(struct worker *worker) {
    for (int i = 0; i < SPIN_IDLE; i++) {
        gate_t now = atomic_load_explicit(&gate, memory_order_acquire);
        if (wanted(now, worker))
            return now;
        AC_PAUSE();
    }
    pthread_mutex_lock(&pool.mutex);
    worker->asleep = 1;
    gate_t now = atomic_load_explicit(&gate, memory_order_acquire);
    while (!wanted(now, worker)) {
        pthread_cond_wait(&worker->wake, &pool.mutex);
        now = atomic_load_explicit(&gate, memory_order_acquire);
    }
    worker->asleep = 0;
    pthread_mutex_unlock(&pool.mutex);
    return now;
}

/* Enter the region; 0 if it is closed or another one by now. */
static int enter(gate_t now) {
    const unsigned generation = generation_of(now);
    while (generation_of(now) == generation && !(now >> CLOSED & 1))
        if (atomic_compare_exchange_weak_explicit(&gate, &now, now + 1, memory_order_acq_rel, memory_order_acquire))
            return 1;
    return 0;
}

static void *work(void *argument) {
    struct worker *worker = argument;
    inside = 1;
    for (;;) {
        gate_t now = next_region(worker);
        worker->seen = generation_of(now);
        if (!enter(now))
            continue;
        /* Nobody changes these while someone who entered hasn't left. */
        pool.body(pool.context, worker->thread, threads_of(now));
        atomic_fetch_add_explicit(&left, 1, memory_order_release);
    }
    return NULL;
}

/* After fork() only the calling thread exists: forget the workers and make locks afresh. */
static void forget_workers(void) {
    pthread_mutex_init(&pool.exclusive, NULL);
    pthread_mutex_init(&pool.mutex, NULL);
    pool.workers = 0;
    atomic_store(&arrived, 0);
    inside = 0;
}

static void register_fork_handler(void) { pthread_atfork(NULL, NULL, forget_workers); }

static int start_workers(int count) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_fork_handler);
    while (pool.workers < count) {
        pthread_t id;
        struct worker *worker = &workers[pool.workers];
        worker->thread = pool.workers + 1;
        worker->seen = generation_of(atomic_load(&gate));
        worker->asleep = 0;
        pthread_cond_init(&worker->wake, NULL);
        if (pthread_create(&id, NULL, work, worker))
            break;
        pthread_detach(id);
        pool.workers++;
    }
    return pool.workers;
}

/* Give the workers body and context, and wake those that sleep. The caller holds `exclusive`. */
static void open_region(int threads, ac_body body, void *context) {
    unsigned next = generation_of(atomic_load_explicit(&gate, memory_order_relaxed)) + 1;
    pool.body = body;
    pool.context = context;
    atomic_store_explicit(&left, 0, memory_order_relaxed);
    atomic_store_explicit(&gate, (gate_t)next << GENERATION | (gate_t)threads << THREADS, memory_order_release);
    pthread_mutex_lock(&pool.mutex);
    for (int i = 0; i < threads - 1; i++)
        if (workers[i].asleep)
            pthread_cond_signal(&workers[i].wake);
    pthread_mutex_unlock(&pool.mutex);
}

/* Wait until `workers` have left the region. */
static void wait_for(int workers) {
    int spins = 0;
    while (atomic_load_explicit(&left, memory_order_acquire) < workers)
        wait_a_little(&spins);
}

/* A region of at most `threads`; `patient`: all of them must take part. */
static void run(int threads, int patient, ac_body body, void *context) {
    if (threads > AC_MAX_THREADS)
        threads = AC_MAX_THREADS;
    if (threads <= 1 || inside) {
        body(context, 0, 1);
        return;
    }
    pthread_mutex_lock(&pool.exclusive);
    int have = start_workers(threads - 1);
    if (have + 1 < threads)
        threads = have + 1;
    open_region(threads, body, context);
    inside = 1;
    body(context, 0, threads);
    inside = 0;
    if (patient)
        wait_for(threads - 1);
    else
        wait_for(entered(atomic_fetch_or_explicit(&gate, (gate_t)1 << CLOSED, memory_order_acq_rel)));
    pthread_mutex_unlock(&pool.exclusive);
}

void ac_region(int threads, ac_body body, void *context) { run(threads, 1, body, context); }

/* Runs of items that each thread of ac_each begins with. */
enum { RUNS = 4 };

struct each {
    ac_items body;
    void *context;
    long total, unit;
    int runs; /* of all threads */
    atomic_uchar taken[RUNS * AC_MAX_THREADS];
};

static void each_body(void *context, int thread, int threads) {
    struct each *each = context;
    for (int i = 0; i < each->runs; i++) {
        int run = (i + (int)((long)each->runs * thread / threads)) % each->runs;
        if (atomic_load_explicit(&each->taken[run], memory_order_relaxed) ||
            atomic_exchange_explicit(&each->taken[run], 1, memory_order_relaxed))
            continue;
        long first, last;
        ac_share(each->total, each->unit, run, each->runs, &first, &last);
        if (first < last)
            each->body(each->context, first, last);
    }
}

void ac_each(int threads, long total, long unit, ac_items body, void *context) {
    if (threads <= 1 || inside || total <= unit) {
        if (total > 0)
            body(context, 0, total);
        return;
    }
    struct each each = {.body = body, .context = context, .total = total, .unit = unit};
    each.runs = RUNS * (threads > AC_MAX_THREADS ? AC_MAX_THREADS : threads);
    run(threads, 0, each_body, &each);
}
