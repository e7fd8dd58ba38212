/* Violations: what real hardware would crash on, or silently compute wrongly.
 *
 * What comes before what is kept in vector clocks: for each stream, how many of its operations are
 * known to be done. An operation comes after those before it on its stream, after what was recorded
 * by the events that the stream waited for, and after all that the host knew to be done when it made
 * the call: what it synchronized with or queried with success, and what came before a value that a
 * stream has written to memory. All threads of the host know the same.
 *
 * Two accesses to the same memory of which neither comes before the other are a race, unless both
 * read, both are atomic, or a test allows races there.
 */

#include "driver.h"
#include "harness.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_VIOLATIONS = 1000, MOST_RANGES = 12 };

enum access_kind { READ, WRITES, ATOMIC };

struct range {
    uint64_t low, high;
    enum access_kind kind;
};

struct access {
    struct range range;
    struct stream *stream;
    uint32_t number; /* of the operation */
    const char *name;
};

struct allocation {
    uint64_t address;
    size_t bytes;
    bool host, freed;
};

static struct {
    char **items;
    size_t count, capacity;
} violations;

static struct {
    struct access *items;
    size_t count, capacity;
} accesses; /* that not all operations to come are known to come after */

static struct {
    struct allocation *items;
    size_t count, capacity;
} allocations;

static struct {
    struct range *items;
    size_t count, capacity;
} allowed;

#define ADD(list) \
    ((list).items = grown((list).items, (list).count, &(list).capacity, sizeof *(list).items), \
     &(list).items[(list).count++])

void violation(bool fatal, const char *format, ...)
{
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (fatal && state.settings.aborts) {
        fprintf(stderr, "test driver: %s\n", text);
        abort();
    }
    if (violations.count < MOST_VIOLATIONS)
        *ADD(violations) = strdup(text);
}

void open_checks(void)
{
    for (size_t i = 0; i < violations.count; i++)
        free(violations.items[i]);
    violations.count = 0;
}

/* Reports what is left, and frees the memory that was kept for those that use it too late. */
void close_checks(void)
{
    for (size_t i = 0; i < allocations.count; i++) {
        struct allocation *each = &allocations.items[i];
        if (!each->freed && !state.lost)
            violation(false, "leak: %zu bytes of %s memory were never freed", each->bytes,
                      each->host ? "host" : "device");
        free((void *)each->address);
    }
    accesses.count = allocations.count = allowed.count = 0;
}

void join(clock_of clock, const clock_of other)
{
    for (int slot = 0; slot < state.slots; slot++)
        if (clock[slot] < other[slot])
            clock[slot] = other[slot];
}

static struct range range(int64_t address, int64_t bytes, enum access_kind kind)
{
    return (struct range){(uint64_t)address, (uint64_t)(address + bytes), kind};
}

/* Of a table as a whole: which rows are touched is told by memory. */
static int ranges_of_rows(const struct work *work, struct range *found)
{
    const struct image *image = &work->image;
    const int64_t *a = work->arguments;
    int64_t size = image->float64 ? 8 : 4, count = 0;
    if (image->kernel == ROW_RANGE_KERNEL) {
        found[count++] = range(a[RANGE_ROWS], 8 * a[RANGE_POSITIONS], READ);
        found[count++] = range(a[RANGE_VERDICT], 4, WRITES);
    } else if (image->kernel == ROW_COPY_KERNEL) {
        int64_t row = a[COPY_UNITS] * image->unit * size;
        found[count++] = range(a[COPY_TABLE], a[COPY_TABLE_ROWS] * row, READ);
        found[count++] = range(a[COPIES], a[COPY_POSITIONS] * row, WRITES);
        found[count++] = range(a[COPY_ROWS], 8 * a[COPY_POSITIONS], READ);
        found[count++] = range(a[COPY_VERDICT], 4, WRITES);
        if (image->locked)
            found[count++] = range(a[COPY_LOCKS], 4 * a[COPY_STRIPES], ATOMIC);
    } else {
        int64_t row = a[UNITS] * image->unit * size, table = a[TABLE_ROWS] * row;
        found[count++] = range(a[ROW_PARAM], table, WRITES);
        found[count++] = range(a[ROW_MS], table, WRITES);
        if (image->centered)
            found[count++] = range(a[ROW_GRAD_AVG], table, WRITES);
        if (image->momentum)
            found[count++] = range(a[ROW_BUFFER], table, WRITES);
        found[count++] = range(a[ROW_GRADS], a[POSITIONS] * row, READ);
        found[count++] = range(a[ROWS], 8 * a[POSITIONS], READ);
        found[count++] = range(a[ORDER], 8 * a[POSITIONS], READ);
        if (image->checked)
            found[count++] = range(a[FOUND_INF], 4, READ);
        found[count++] = range(a[ROW_VERDICT], 4, WRITES);
        if (image->counted)
            found[count++] = range(a[ROW_COUNTS], 24 * a[TABLE_ROWS], ATOMIC);
        if (image->locked)
            found[count++] = range(a[LOCKS], 4 * a[STRIPES], ATOMIC);
    }
    return (int)count;
}

static int ranges_of(const struct work *work, struct range *found)
{
    if (work->kind == KERNEL && work->image.kernel >= ROW_RMSPROP_KERNEL)
        return ranges_of_rows(work, found);
    const struct image *image = &work->image;
    const int64_t *a = work->arguments;
    int64_t size = image->float64 ? 8 : 4, target = (int64_t)work->target, count = 0;
    if (work->kind != KERNEL) {
        found[count++] = range(target, (int64_t)work->bytes, WRITES);
        if (work->kind == COPY)
            found[count++] = range((int64_t)work->source, (int64_t)work->bytes, READ);
    } else if (image->kernel == RMSPROP_KERNEL) {
        int64_t bytes = elements_of(work) * size;
        found[count++] = range(a[PARAM], bytes, WRITES);
        found[count++] = range(a[GRAD], bytes, READ);
        found[count++] = range(a[MS], bytes, WRITES);
        if (image->centered)
            found[count++] = range(a[GRAD_AVG], bytes, WRITES);
        if (image->momentum)
            found[count++] = range(a[BUFFER], bytes, WRITES);
        if (image->lr_on_device)
            found[count++] = range(a[LR], 8, READ);
        if (image->checked)
            found[count++] = range(a[VERDICT], 4, READ);
        if (image->counted)
            found[count++] = range(a[COUNTS], 24 * (int64_t)work->programs, ATOMIC);
    } else {
        bool finite = image->kernel == FINITE_KERNEL;
        found[count++] = range(a[0], elements_of(work) * size, finite ? READ : WRITES);
        if (finite)
            found[count++] = range(a[2], 4, WRITES);
    }
    return (int)count;
}

static bool overlap(struct range a, struct range b)
{
    return a.low < b.high && b.low < a.high;
}

static bool conflict(struct range a, struct range b)
{
    if (!overlap(a, b) || (a.kind == b.kind && a.kind != WRITES))
        return false;
    uint64_t low = a.low > b.low ? a.low : b.low, high = a.high < b.high ? a.high : b.high;
    for (size_t i = 0; i < allowed.count; i++)
        if (allowed.items[i].low <= low && high <= allowed.items[i].high)
            return false;
    return true;
}

static const char *verb(enum access_kind kind)
{
    static const char *const verbs[] = {"reads", "writes", "counts in"};
    return verbs[kind];
}

static void check_memory(const struct access *access)
{
    for (size_t i = 0; i < allocations.count; i++) {
        const struct allocation *each = &allocations.items[i];
        struct range whole = {each->address, each->address + each->bytes, READ};
        if (!overlap(access->range, whole))
            continue;
        if (each->freed)
            violation(true, "%s on stream %lu %s memory that was freed", access->name,
                      access->stream->number, verb(access->range.kind));
        else if (access->range.low < whole.low || access->range.high > whole.high)
            violation(true, "%s on stream %lu %s memory beyond an allocation of %zu bytes",
                      access->name, access->stream->number, verb(access->range.kind), each->bytes);
    }
}

/* Looks for races with what is known so far; forgets what everything to come comes after. */
static void check_races(const struct access *access)
{
    const uint32_t *known = access->stream->clock;
    for (size_t i = 0; i < accesses.count; i++) {
        struct access *other = &accesses.items[i];
        if (other->number <= state.host_clock[other->stream->slot]) {
            *other = accesses.items[--accesses.count];
            i--;
        } else if (other->number > known[other->stream->slot] &&
                   conflict(access->range, other->range)) {
            violation(false,
                      "race: %s (operation %u of stream %lu) %s memory that %s (operation %u of "
                      "stream %lu) %s, and neither comes before the other",
                      access->name, access->number, access->stream->number,
                      verb(access->range.kind), other->name, other->number, other->stream->number,
                      verb(other->range.kind));
        }
    }
}

static void check_races_of_nodes(struct exec *exec)
{
    for (size_t i = 0; i < exec->graph.count; i++) {
        struct range mine[MOST_RANGES], others[MOST_RANGES];
        const struct node *node = &exec->graph.nodes[i];
        int count = ranges_of(&node->work, mine);
        for (size_t j = 0; j < i; j++) {
            if (node->after[j / 64] >> (j % 64) & 1)
                continue;
            int more = ranges_of(&exec->graph.nodes[j].work, others);
            for (int pair = 0; pair < count * more; pair++)
                if (conflict(mine[pair / more], others[pair % more]))
                    violation(false,
                              "race: node %zu (%s) of graph %lu %s memory that node %zu (%s) %s, "
                              "and neither comes before the other",
                              i, name_of(&node->work), exec->graph.number,
                              verb(mine[pair / more].kind), j,
                              name_of(&exec->graph.nodes[j].work), verb(others[pair % more].kind));
        }
    }
    exec->checked = true;
}

static void note_work(struct stream *stream, uint32_t number, const struct work *work)
{
    struct range found[MOST_RANGES];
    int count = ranges_of(work, found);
    for (int i = 0; i < count; i++) {
        struct access access = {found[i], stream, number, name_of(work)};
        check_memory(&access);
        check_races(&access);
    }
    for (int i = 0; i < count; i++)
        *ADD(accesses) = (struct access){found[i], stream, number, name_of(work)};
}

void note_accesses(struct stream *stream, struct operation *operation)
{
    if (operation->kind == WORK)
        note_work(stream, operation->number, &operation->work);
    if (operation->kind != GRAPH)
        return;
    if (!operation->exec->checked)
        check_races_of_nodes(operation->exec);
    for (size_t i = 0; i < operation->exec->graph.count; i++)
        note_work(stream, operation->number, &operation->exec->graph.nodes[i].work);
}

/* The first operation not done yet that touches a range, or NULL. */
static const struct access *pending_in(struct range touched)
{
    for (size_t i = 0; i < accesses.count; i++) {
        const struct access *each = &accesses.items[i];
        if (each->number > each->stream->done && overlap(each->range, touched))
            return each;
    }
    return NULL;
}

void note_allocation(uint64_t address, size_t bytes, bool host)
{
    memset((void *)address, 0xFF, bytes); /* NaN: nobody may rely on what is there */
    *ADD(allocations) = (struct allocation){address, bytes, host, false};
}

static struct allocation *allocation_at(uint64_t address, bool host)
{
    for (size_t i = 0; i < allocations.count; i++) {
        struct allocation *each = &allocations.items[i];
        if (each->host == host && each->address == address)
            return each;
    }
    return NULL;
}

bool is_pinned(uint64_t address)
{
    const struct allocation *found = allocation_at(address, true);
    return found && !found->freed;
}

CUresult note_free(uint64_t address, bool host)
{
    struct allocation *found = allocation_at(address, host);
    if (!found || found->freed) {
        violation(true, "memory is freed that was %s", found ? "freed before" : "never allocated");
        return CUDA_ERROR_INVALID_VALUE;
    }
    const struct access *pending =
        pending_in((struct range){address, address + found->bytes, WRITES});
    if (pending)
        violation(false, "memory is freed that %s (operation %u of stream %lu) still %s",
                  pending->name, pending->number, pending->stream->number,
                  verb(pending->range.kind));
    found->freed = true;
    return CUDA_SUCCESS;
}

void test_allow_races(uint64_t address, uint64_t bytes)
{
    lock();
    *ADD(allowed) = (struct range){address, address + bytes, WRITES};
    unlock();
}

void test_host_write(uint64_t address, uint64_t bytes, int poison)
{
    lock();
    const struct access *pending = pending_in((struct range){address, address + bytes, WRITES});
    if (pending)
        violation(false, "the host may write memory that %s (operation %u of stream %lu) still %s",
                  pending->name, pending->number, pending->stream->number,
                  verb(pending->range.kind));
    if (poison)
        memset((void *)address, 0xFF, bytes);
    unlock();
}

uint64_t test_violations(void)
{
    return violations.count;
}

const char *test_violation(uint64_t number)
{
    return violations.items[number];
}
