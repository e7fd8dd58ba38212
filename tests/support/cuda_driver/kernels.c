/* What kernels, copies and memsets do: a step at a time, so that others come between.
 *
 * The arithmetic is that of hogstream's kernels, bit for bit: each operation is rounded once, in the
 * order written. A block takes two steps, one to read and compute, one to store: updates of other
 * streams may land between, and are lost as on a device.
 */

#include "driver.h"
#include "elements.h"

#include <stdlib.h>
#include <string.h>

const char *const kernel_names[KERNELS] = {"rmsprop_kernel",     "finite_kernel",
                                           "fill_kernel",        "row_rmsprop_kernel",
                                           "row_range_kernel",   "row_copy_kernel"};
const int kernel_arguments[KERNELS] = {19, 3, 3, 30, 4, 10};

const char *name_of(const struct work *work)
{
    static const char *const others[] = {[MEMSET] = "memset", [COPY] = "copy",
                                         [WRITE_VALUE] = "write of a value"};
    return work->kind == KERNEL ? kernel_names[work->image.kernel] : others[work->kind];
}

int64_t elements_of(const struct work *work)
{
    static const int places[KERNELS] = {ELEMENTS, 1, 1, POSITIONS, RANGE_POSITIONS, COPY_POSITIONS};
    return work->arguments[places[work->image.kernel]];
}

#define DEFINE_RMSPROP(TYPE) \
    static void compute_##TYPE(struct run *run, int64_t low, int64_t high) \
    { \
        const struct image *image = &run->work->image; \
        const int64_t *a = run->work->arguments; \
        TYPE *param = (TYPE *)a[PARAM], *grad = (TYPE *)a[GRAD], *mean = (TYPE *)a[MS], \
             *grad_avg = (TYPE *)a[GRAD_AVG], *buffer = (TYPE *)a[BUFFER]; \
        struct factors_##TYPE factors = factors_of_##TYPE(image, a + LR); \
        for (int64_t i = low; i < high; i++) { \
            TYPE p = LOAD(param + i), g = LOAD(grad + i), ms = LOAD(mean + i), ga = 0, buf = 0; \
            if (image->centered) \
                ga = LOAD(grad_avg + i); \
            if (image->momentum) \
                buf = LOAD(buffer + i); \
            update_##TYPE(image, &factors, g, &p, &ms, &ga, &buf); \
            if (image->centered) \
                ((TYPE *)run->grad_avg)[i - low] = ga; \
            if (image->momentum) \
                ((TYPE *)run->buffer)[i - low] = buf; \
            ((TYPE *)run->param)[i - low] = p; \
            ((TYPE *)run->ms)[i - low] = ms; \
        } \
    } \
    static void store_##TYPE(struct run *run, int64_t low, int64_t high) \
    { \
        const struct image *image = &run->work->image; \
        const int64_t *a = run->work->arguments; \
        TYPE *param = (TYPE *)a[PARAM], *mean = (TYPE *)a[MS], *grad_avg = (TYPE *)a[GRAD_AVG], \
             *buffer = (TYPE *)a[BUFFER]; \
        for (int64_t i = low; i < high; i++) { \
            STORE(mean + i, ((TYPE *)run->ms)[i - low]); \
            if (image->centered) \
                STORE(grad_avg + i, ((TYPE *)run->grad_avg)[i - low]); \
            if (image->momentum) \
                STORE(buffer + i, ((TYPE *)run->buffer)[i - low]); \
            STORE(param + i, ((TYPE *)run->param)[i - low]); \
        } \
    }

DEFINE_RMSPROP(float)
DEFINE_RMSPROP(double)

/* The first half of a block: reads its witness, then the block; false if there is nothing to do. */
static bool compute_block(struct run *run, int64_t low, int64_t high)
{
    const struct work *work = run->work;
    if (work->image.checked && LOAD((int32_t *)work->arguments[VERDICT]) != 0)
        return false;
    if (work->image.counted) {
        int64_t *counts = (int64_t *)work->arguments[COUNTS] + run->block;
        run->version = __atomic_load_n(counts, __ATOMIC_ACQUIRE);
        run->witness = __atomic_load_n(counts + work->programs, __ATOMIC_ACQUIRE);
    }
    (work->image.float64 ? compute_double : compute_float)(run, low, high);
    return true;
}

/* The second half: writes the block, then its witness. */
static void store_block(struct run *run, int64_t low, int64_t high)
{
    const struct work *work = run->work;
    (work->image.float64 ? store_double : store_float)(run, low, high);
    if (!work->image.counted)
        return;
    int64_t *landed = (int64_t *)work->arguments[COUNTS] + run->block;
    int64_t *survived = landed + work->programs, *overwritten = survived + work->programs;
    __atomic_store_n(survived, run->witness + 1, __ATOMIC_RELEASE);
    int64_t overlapping = __atomic_fetch_add(landed, 1, __ATOMIC_ACQ_REL) - run->version;
    if (overlapping)
        __atomic_fetch_add(overwritten, overlapping, __ATOMIC_RELAXED);
}

static void check_block(const struct work *work, int64_t low, int64_t high)
{
    int64_t exponent = work->image.exponent;
    for (int64_t i = low; i < high; i++) {
        int64_t bits = work->image.float64 ? LOAD((int64_t *)work->arguments[0] + i)
                                           : LOAD((int32_t *)work->arguments[0] + i);
        if ((bits & exponent) == exponent)
            STORE((int32_t *)work->arguments[2], 1);
    }
}

static void fill_block(const struct work *work, int64_t low, int64_t high)
{
    for (int64_t i = low; i < high; i++) {
        if (work->image.float64)
            STORE((int64_t *)work->arguments[0] + i, work->arguments[2]);
        else
            STORE((int32_t *)work->arguments[0] + i, (int32_t)work->arguments[2]);
    }
}

static void set_memory(const struct work *work)
{
    for (uint64_t at = work->target; at < work->target + work->bytes; at += work->element) {
        if (work->element == 4)
            STORE((uint32_t *)at, (uint32_t)work->value);
        else if (work->element == 2)
            STORE((uint16_t *)at, (uint16_t)work->value);
        else
            STORE((uint8_t *)at, (uint8_t)work->value);
    }
}

void do_at_once(const struct work *work)
{
    if (work->kind == MEMSET)
        set_memory(work);
    else if (work->kind == COPY)
        memmove((void *)work->target, (void *)work->source, work->bytes);
    else /* after all that the stream did before */
        __atomic_store_n((uint64_t *)work->target, work->value, __ATOMIC_RELEASE);
}

void begin(struct run *run, const struct work *work)
{
    *run = (struct run){.work = work};
    if (work->kind == KERNEL && work->image.kernel >= ROW_RMSPROP_KERNEL)
        begin_rows(run);
    if (work->kind != KERNEL || work->image.kernel != RMSPROP_KERNEL)
        return;
    size_t bytes = (size_t)work->image.block * (work->image.float64 ? 8 : 4);
    run->param = malloc(bytes);
    run->ms = malloc(bytes);
    run->grad_avg = malloc(bytes);
    run->buffer = malloc(bytes);
}

static bool end(struct run *run)
{
    free(run->param);
    free(run->ms);
    free(run->grad_avg);
    free(run->buffer);
    free(run->versions);
    free(run->witnesses);
    return true;
}

bool step(struct run *run)
{
    const struct work *work = run->work;
    if (work->kind != KERNEL) {
        do_at_once(work);
        return end(run);
    }
    if (work->image.kernel >= ROW_RMSPROP_KERNEL)
        return step_rows(run) && ++run->block == work->programs ? end(run) : false;
    bool updates = work->image.kernel == RMSPROP_KERNEL;
    int64_t elements = elements_of(work);
    int64_t low = (int64_t)run->block * work->image.block, high = low + work->image.block;
    if (high > elements)
        high = elements;
    if (updates && !run->computed) {
        run->computed = compute_block(run, low, high);
        if (run->computed)
            return false;
    } else if (updates) {
        store_block(run, low, high);
        run->computed = false;
    } else if (work->image.kernel == FINITE_KERNEL) {
        check_block(work, low, high);
    } else {
        fill_block(work, low, high);
    }
    return ++run->block == work->programs ? end(run) : false;
}
