/* What kernels, copies and memsets do: a step at a time, so that others come between.
 *
 * The arithmetic is that of hogstream's kernels, bit for bit: each operation is rounded once, in the
 * order written. A block takes two steps, one to read and compute, one to store: updates of other
 * streams may land between, and are lost as on a device.
 */

#include "driver.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const char *const kernel_names[KERNELS] = {"rmsprop_kernel", "finite_kernel", "fill_kernel"};
const int kernel_arguments[KERNELS] = {19, 3, 3};

const char *name_of(const struct work *work)
{
    static const char *const others[] = {[MEMSET] = "memset", [COPY] = "copy",
                                         [WRITE_VALUE] = "write of a value"};
    return work->kind == KERNEL ? kernel_names[work->image.kernel] : others[work->kind];
}

int64_t elements_of(const struct work *work)
{
    return work->arguments[work->image.kernel == RMSPROP_KERNEL ? ELEMENTS : 1];
}

static double as_float64(int64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Elements are loaded and stored whole, as on a device, whoever else writes them. */
#define LOAD(address) \
    ({ __typeof__(*(address)) loaded; __atomic_load(address, &loaded, __ATOMIC_RELAXED); loaded; })
#define STORE(address, value) \
    ({ __typeof__(*(address)) stored = (value); __atomic_store(address, &stored, __ATOMIC_RELAXED); })

#define DEFINE_RMSPROP(TYPE, SQRT) \
    static void compute_##TYPE(struct run *run, int64_t low, int64_t high) \
    { \
        const struct image *image = &run->work->image; \
        const int64_t *a = run->work->arguments; \
        TYPE *param = (TYPE *)a[PARAM], *grad = (TYPE *)a[GRAD], *mean = (TYPE *)a[MS], \
             *grad_avg = (TYPE *)a[GRAD_AVG], *buffer = (TYPE *)a[BUFFER]; \
        double lr64 = image->lr_on_device ? LOAD((double *)a[LR]) : as_float64(a[LR]); \
        TYPE lr = (TYPE)lr64, alpha = (TYPE)as_float64(a[ALPHA]), \
             beta = (TYPE)as_float64(a[BETA]), eps = (TYPE)as_float64(a[EPS]), \
             weight_decay = (TYPE)as_float64(a[WEIGHT_DECAY]), \
             shrink = (TYPE)(1.0 - lr64 * as_float64(a[DECAY])), \
             sign = (TYPE)as_float64(a[SIGN]), momentum = (TYPE)as_float64(a[MOMENTUM]); \
        for (int64_t i = low; i < high; i++) { \
            TYPE p = LOAD(param + i), g = LOAD(grad + i) * sign, ms = LOAD(mean + i); \
            if (image->coupled) \
                g = g + weight_decay * p; \
            p = p * shrink; \
            ms = alpha * ms + (beta * g) * g; \
            TYPE v = ms; \
            if (image->centered) { \
                TYPE ga = alpha * LOAD(grad_avg + i) + beta * g; \
                v = ms - ga * ga; \
                v = v < 0 ? 0 : v; \
                ((TYPE *)run->grad_avg)[i - low] = ga; \
            } \
            TYPE d = image->eps_inside_sqrt ? SQRT(v + eps) : SQRT(v) + eps; \
            TYPE step = (image->momentum && !image->lr_in_momentum ? g : lr * g) / d; \
            if (image->momentum) { \
                TYPE buf = momentum * LOAD(buffer + i) + step; \
                step = image->lr_in_momentum ? buf : lr * buf; \
                ((TYPE *)run->buffer)[i - low] = buf; \
            } \
            ((TYPE *)run->param)[i - low] = p - step; \
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

DEFINE_RMSPROP(float, sqrtf)
DEFINE_RMSPROP(double, sqrt)

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
    return true;
}

bool step(struct run *run)
{
    const struct work *work = run->work;
    if (work->kind != KERNEL) {
        do_at_once(work);
        return end(run);
    }
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
