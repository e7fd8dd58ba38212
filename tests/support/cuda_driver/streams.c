/* Operations in the order of their streams. A thread for each does them, delayed before and within
 * by what is drawn from the seed; unless time is counted, which counted_time.c does.
 */

#include "driver.h"
#include "harness.h"

#include <fenv.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct state state = {.lock = PTHREAD_ADAPTIVE_MUTEX_INITIALIZER_NP,
                      .host = PTHREAD_COND_INITIALIZER,
                      .default_stream = {.slot = -1}};

static struct operation *unused; /* kept for the next */

static struct {
    struct entry *items;
    size_t count, capacity;
} entries;

void *grown(void *items, size_t count, size_t *capacity, size_t size)
{
    if (count < *capacity)
        return items;
    *capacity = *capacity ? 2 * *capacity : 16;
    return realloc(items, *capacity * size);
}

/* splitmix64 (Steele, Lea and Flood, 2014) */
static uint64_t draw(uint64_t *random)
{
    uint64_t z = *random += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
}

/* Delays the calling thread, or gives others a turn, or neither. */
static void delay(struct stream *stream)
{
    uint64_t drawn = draw(&stream->random);
    if (drawn % 4 == 0)
        sched_yield();
    else if (drawn % 4 == 1 && stream->pace)
        nanosleep(&(struct timespec){0, (long)(drawn >> 8) % (stream->pace * 1000L)}, NULL);
}

/* Delays a step of a work, or not: a few times in all, however many steps there are. */
static void delay_step(struct stream *stream, const struct work *work)
{
    if (work->programs < 4 || draw(&stream->random) % (work->programs / 2) == 0)
        delay(stream);
}

bool is_done(struct point point)
{
    return !point.stream || point.stream->done >= point.count;
}

CUresult wait_until_done(struct point point)
{
    state.hosts++;
    while (!is_done(point) && !state.lost && !state.stopping)
        pthread_cond_wait(&state.host, &state.lock);
    state.hosts--;
    if (state.stopping) {
        pthread_cond_broadcast(&state.host);
        return CUDA_ERROR_DEINITIALIZED;
    }
    return state.lost ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
}

struct operation *new_operation(struct stream *stream, int kind)
{
    struct operation *operation = unused;
    if (operation)
        unused = operation->next;
    else
        operation = malloc(sizeof *operation);
    join_use(stream);
    operation->next = NULL;
    operation->kind = kind;
    operation->begun = 0;
    operation->called = now_ns();
    operation->after = (struct point){0};
    operation->event = NULL;
    operation->clock = NULL;
    return operation;
}

static void let_go(struct operation *operation)
{
    free(operation->clock);
    operation->next = unused;
    unused = operation;
}

bool is_write(const struct operation *operation)
{
    return operation->kind == WORK && operation->work.kind == WRITE_VALUE;
}

bool is_kernel(const struct operation *operation)
{
    return operation->kind == WORK && operation->work.kind == KERNEL;
}

/* An operation is done: takes it off its stream, and wakes who may wait for it. */
void finish(struct stream *stream, int64_t begun, int64_t time)
{
    static const char *const names[] = {[WAIT] = "wait", [RECORD] = "record", [GRAPH] = "graph"};
    struct operation *operation = stream->first;
    struct event *event = item_of(EVENTS, operation->event);
    if (operation->kind == WAIT && event)
        event->waiting--;
    if (operation->kind == RECORD && event && event->record.stream == stream)
        event->time = time; /* of the latest record, once that is done */
    if (is_write(operation)) /* who sees the value finds the operation done */
        do_at_once(&operation->work);
    if (operation->clock)
        join(state.host_clock, operation->clock);
    if (state.settings.logs) {
        entries.items = grown(entries.items, entries.count, &entries.capacity, sizeof *entries.items);
        entries.items[entries.count++] = (struct entry){
            stream->number, operation->number,
            operation->kind == WORK ? name_of(&operation->work) : names[operation->kind],
            operation->called, begun, time};
    }
    stream->done = operation->number;
    stream->ended[stream->done % REMEMBERED] = time;
    stream->first = operation->next;
    let_go(operation);
    if (state.hosts)
        pthread_cond_broadcast(&state.host);
}

static void run_graph(struct stream *stream, const struct exec *exec)
{
    size_t count = exec->graph.count, left = count;
    struct run *runs = malloc(count * sizeof *runs);
    uint64_t *done = calloc(count / 64 + 1, sizeof *done);
    for (size_t i = 0; i < count; i++)
        begin(&runs[i], &exec->graph.nodes[i].work);
    while (left) { /* a step of any node whose turn it may be */
        size_t i = draw(&stream->random) % count;
        bool ready = !(done[i / 64] >> (i % 64) & 1);
        for (size_t word = 0; word <= i / 64; word++)
            ready = ready && !(exec->graph.nodes[i].after[word] & ~done[word]);
        if (!ready)
            continue;
        delay_step(stream, runs[i].work);
        if (step(&runs[i])) {
            done[i / 64] |= UINT64_C(1) << (i % 64);
            left--;
        }
    }
    free(runs);
    free(done);
}

static void run_operation(struct stream *stream, struct operation *operation)
{
    delay(stream);
    if (operation->kind == GRAPH) {
        run_graph(stream, operation->exec);
    } else if (operation->kind == WORK && !is_write(operation)) {
        struct run run;
        begin(&run, &operation->work);
        while (!step(&run))
            delay_step(stream, run.work);
    }
}

static void wake_dependent(const struct stream *stream)
{
    for (int slot = 0; slot < state.slots; slot++) {
        struct operation *first = state.in_use[slot]->first;
        if (first && first->after.stream == stream)
            pthread_cond_signal(&state.in_use[slot]->wake);
    }
}

static void *serve(void *argument)
{
    struct stream *stream = argument;
    fesetenv(FE_DFL_ENV); /* denormals are kept, whoever made the thread */
    lock();
    while (!state.stopping) {
        struct operation *operation = stream->first;
        if (!operation || stream->held || state.lost || !is_done(operation->after)) {
            pthread_cond_wait(&stream->wake, &state.lock);
            continue;
        }
        unlock();
        int64_t begun = now_ns();
        run_operation(stream, operation);
        lock();
        if (state.lost)
            continue;
        finish(stream, begun, now_ns());
        wake_dependent(stream);
    }
    unlock();
    return NULL;
}

static uint64_t seed_of(uint64_t number)
{
    uint64_t random = state.settings.seed;
    random = draw(&random) ^ number;
    return draw(&random);
}

void join_use(struct stream *stream)
{
    static const unsigned paces[] = {0, 20, 60, 150}; /* us */
    if (stream->slot >= 0)
        return;
    if (state.slots == MAX_STREAMS) {
        violation(true, "more than %d streams are in use", MAX_STREAMS);
        abort();
    }
    stream->slot = state.slots;
    stream->random = seed_of((uint64_t)stream->slot);
    stream->pace = paces[draw(&stream->random) % 4];
    state.in_use[state.slots++] = stream;
    pthread_cond_init(&stream->wake, NULL);
    if (!state.settings.timed)
        pthread_create(&stream->thread, NULL, serve, stream);
}

static bool blocks(const struct stream *stream)
{
    return !(stream->flags & CU_STREAM_NON_BLOCKING);
}

static void append(struct stream *stream, struct operation *operation)
{
    operation->number = ++stream->issued;
    if (stream->first)
        stream->last->next = operation;
    else
        stream->first = operation;
    stream->last = operation;
    if (state.settings.timed) {
        tell_device();
        return;
    }
    join(stream->clock, state.host_clock);
    stream->clock[stream->slot] = operation->number;
    note_accesses(stream, operation);
    if (is_write(operation)) {
        operation->clock = malloc(sizeof stream->clock);
        memcpy(operation->clock, stream->clock, sizeof stream->clock);
    }
    if (stream->first == operation)
        pthread_cond_signal(&stream->wake);
}

static void append_wait(struct stream *stream, struct stream *other)
{
    if (other == stream || other->slot < 0 || other->done == other->issued)
        return;
    struct operation *wait = new_operation(stream, WAIT);
    wait->after = (struct point){other, other->issued};
    join(stream->clock, other->clock);
    append(stream, wait);
}

/* The default stream and those that are not non-blocking come after each other. */
void enqueue(struct stream *stream, struct operation *operation)
{
    if (stream == &state.default_stream) {
        for (int slot = 0; slot < state.slots; slot++)
            if (blocks(state.in_use[slot]))
                append_wait(stream, state.in_use[slot]);
    } else if (blocks(stream)) {
        append_wait(stream, &state.default_stream);
    }
    append(stream, operation);
}

void open_streams(void)
{
    entries.count = 0;
    if (state.settings.timed)
        start_device();
}

static void leave_use(struct stream *stream)
{
    if (stream->done < stream->issued && !state.lost)
        violation(false, "%u operations are pending on stream %lu", stream->issued - stream->done,
                  stream->number);
    while (stream->first) {
        struct operation *next = stream->first->next;
        let_go(stream->first);
        stream->first = next;
    }
    pthread_cond_destroy(&stream->wake);
    size_t kept = offsetof(struct stream, slot);
    memset((char *)stream + kept, 0, sizeof *stream - kept);
    stream->slot = -1;
    stream->held = stream->captured = false;
}

/* Ends the threads; what is pending never happens, and streams are as if they were new. */
void close_streams(void)
{
    lock();
    state.stopping = true;
    pthread_cond_broadcast(&state.host);
    for (int slot = 0; slot < state.slots; slot++)
        pthread_cond_signal(&state.in_use[slot]->wake);
    while (state.hosts)
        pthread_cond_wait(&state.host, &state.lock);
    unlock();
    if (state.settings.timed)
        end_device();
    for (int slot = 0; slot < state.slots && !state.settings.timed; slot++)
        pthread_join(state.in_use[slot]->thread, NULL);
    lock();
    for (int slot = 0; slot < state.slots; slot++)
        leave_use(state.in_use[slot]);
    state.slots = 0;
    state.stopping = false;
    unlock();
}

uint64_t test_entries(void)
{
    return entries.count;
}

struct entry test_entry(uint64_t number)
{
    return entries.items[number];
}
