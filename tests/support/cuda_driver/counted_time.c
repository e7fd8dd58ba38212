/* Time that is counted: a device that does no arithmetic, but lets operations end when their time
 * has come. A thread of its own is the device, and whoever is kept busy in a call.
 */

#include "driver.h"

#include <sched.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>

static pthread_t thread;
static pthread_cond_t wake;
static bool sleeps;        /* until it is told */
static int64_t due_next;   /* when something is to begin or end, or before; read without the lock */
static int64_t serial_end; /* when the device has done what it does for one launch at a time */
static int busy;           /* streams that have something due */

int64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* When a stream may begin its first operation, or end what it began. */
static int64_t due(const struct stream *stream)
{
    const struct operation *first = stream->first;
    if (!first || stream->held || !is_done(first->after))
        return NEVER;
    int64_t time = first->called + state.settings.dispatch_ns;
    const struct point *after = &first->after;
    if (after->stream && after->stream->done - after->count < REMEMBERED) {
        int64_t ended = after->stream->ended[after->count % REMEMBERED];
        if (after->stream != stream)
            ended += state.settings.crossing_ns;
        time = ended > time ? ended : time;
    }
    return stream->ready > time ? stream->ready : time;
}

/* When a launch ends whose turn comes at a time. */
static int64_t launch_end(int64_t time)
{
    if (serial_end < time)
        serial_end = time;
    serial_end += state.settings.serial_ns;
    time += state.settings.update_ns;
    return time > serial_end ? time : serial_end;
}

static int64_t graph_end(const struct graph *graph, int64_t time)
{
    int64_t *ends = malloc((graph->count + 1) * sizeof *ends), last = time;
    for (size_t i = 0; i < graph->count; i++) {
        ends[i] = time;
        for (size_t j = 0; j < i; j++)
            if ((graph->nodes[i].after[j / 64] >> (j % 64) & 1) && ends[j] > ends[i])
                ends[i] = ends[j];
        if (graph->nodes[i].work.kind == KERNEL)
            ends[i] = launch_end(ends[i]);
        last = ends[i] > last ? ends[i] : last;
    }
    free(ends);
    return last;
}

static void advance(struct stream *stream, int64_t time)
{
    struct operation *operation = stream->first;
    if (!operation->begun) {
        operation->begun = time;
        stream->ready = is_kernel(operation)       ? launch_end(time)
                        : operation->kind == GRAPH ? graph_end(&operation->exec->graph, time)
                                                   : time;
        if (stream->ready > time)
            return;
    }
    if (operation->kind == WORK && !is_kernel(operation) && !is_write(operation))
        do_at_once(&operation->work);
    finish(stream, operation->begun, time);
}

/* Whether a stream's first operation takes up none of the device's time that others want too. */
static bool is_brief(const struct stream *stream)
{
    const struct operation *first = stream->first;
    return first && (first->begun || (first->kind != GRAPH && !is_kernel(first)));
}

/* Does what is due first, if it is by now. Afterwards, or else, says when something is due. */
static bool run_device(int64_t now)
{
    struct stream *next = NULL;
    int64_t time = NEVER;
    busy = 0;
    for (int slot = 0; slot < state.slots && !state.lost; slot++) {
        int64_t its = due(state.in_use[slot]);
        busy += its != NEVER;
        if (its < time) {
            time = its;
            next = state.in_use[slot];
        }
    }
    bool is_due = time <= now;
    while (time <= now) {
        advance(next, time);
        time = due(next);
        if (!is_brief(next))
            break;
    }
    __atomic_store_n(&due_next, is_due ? now : time, __ATOMIC_RELAXED);
    return is_due;
}

/* Keeps the calling thread busy. Meanwhile it is the device: a machine with few cores has none to
 * spare for that. */
void spend(int64_t ns)
{
    if (ns == 0)
        return;
    int64_t now = now_ns(), end = now + ns;
    for (; now < end; now = now_ns()) {
        if (now < __atomic_load_n(&due_next, __ATOMIC_RELAXED) || forked ||
            pthread_mutex_trylock(&state.lock) != 0)
            continue;
        run_device(now);
        unlock();
    }
}

/* Waits until something is due.
 *
 * If few streams are busy, a host that waits for them makes no calls in which it could be the
 * device, and is kept waiting by a thread that sleeps: this one is awake then, as long as there was
 * something to do of late.
 */
static void await_due(int64_t last)
{
    const int64_t nap = 50000;
    int64_t now = now_ns(), time = due_next, awake = time - now < nap ? time : last + nap;
    if (busy <= 2 && now < awake) {
        unlock();
        while (now < __atomic_load_n(&due_next, __ATOMIC_RELAXED) && now < awake) {
            sched_yield(); /* to a host that looks for its values */
            now = now_ns();
        }
        lock();
    } else if (time == NEVER) {
        sleeps = true;
        pthread_cond_wait(&wake, &state.lock);
        sleeps = false;
    } else {
        time = time > now + nap ? time : now + nap;
        struct timespec until = {time / 1000000000, time % 1000000000};
        pthread_cond_timedwait(&wake, &state.lock, &until);
    }
}

static void *be_the_device(void *argument)
{
    (void)argument;
    prctl(PR_SET_TIMERSLACK, 1); /* ns: it sleeps no longer than it has to */
    int64_t last = 0; /* when it did something */
    lock();
    while (!state.stopping) {
        int64_t now = now_ns();
        if (!run_device(now)) {
            await_due(last);
            continue;
        }
        last = now;
        unlock(); /* others take their turn */
        lock();
    }
    unlock();
    return NULL;
}

void start_device(void)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    due_next = NEVER;
    serial_end = 0;
    pthread_create(&thread, NULL, be_the_device, NULL);
}

void tell_device(void)
{
    __atomic_store_n(&due_next, 0, __ATOMIC_RELAXED);
    if (sleeps)
        pthread_cond_signal(&wake);
}

void end_device(void)
{
    lock();
    tell_device();
    unlock();
    pthread_join(thread, NULL);
    pthread_cond_destroy(&wake);
}
