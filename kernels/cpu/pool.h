/* Threads of the CPU kernels. Every task of every kernel runs in a region: the calling thread and
 * threads - 1 workers enter the same function together. Regions are exclusive; a region inside of a region
 * runs on the calling thread alone. Workers spin for some microseconds after a region, then sleep, so that
 * successive small operators don't pay for waking a thread and idle ones cost nothing. */
#ifndef AC_POOL_H
#define AC_POOL_H

#define AC_MAX_THREADS 256

/* What one thread does in a region: thread is 0 .. threads-1, the same function and context for all. */
typedef void (*ac_body)(void *context, int thread, int threads);

/* Run body on `threads` threads (at most AC_MAX_THREADS; fewer when the system refuses) and wait for all. */
void ac_region(int threads, ac_body body, void *context);

/* Work on items [first, last) of a total. */
typedef void (*ac_items)(void *context, long first, long last);

/* Run body over all of [0, total), in runs of multiples of `unit`, on up to `threads` threads. Threads keep their
 * runs from call to call (caches) and take over those of late ones; one that isn't awake when the work is done
 * isn't waited for. So a busy machine costs little, but body must not call ac_barrier. */
void ac_each(int threads, long total, long unit, ac_items body, void *context);

/* Inside of a region: wait until all of its `threads` threads are here. */
void ac_barrier(int threads);

/* The share [first, last) of `thread` when `total` items are cut into runs of multiples of `unit`. */
static inline void ac_share(long total, long unit, int thread, int threads, long *first, long *last) {
    long units = (total + unit - 1) / unit;
    long begin = units * thread / threads, end = units * (thread + 1) / threads;
    *first = begin * unit < total ? begin * unit : total;
    *last = end * unit < total ? end * unit : total;
}

#endif
