/* What kernels of rows do, a step at a time.
 *
 * A program takes a tile of positions. It takes two steps, one to read and compute, one to store; or
 * to copy the first half of each row, and the other. With locks, it is one row, whose lock is held
 * from before the first step until after the second, and tried for again and again until then.
 */

#include "driver.h"
#include "elements.h"

#include <stdlib.h>

static const int64_t *arguments(const struct run *run)
{
    return run->work->arguments;
}

/* The positions of the next program. */
static void tile_of(const struct run *run, int64_t *low, int64_t *high)
{
    int64_t positions = elements_of(run->work);
    *low = (int64_t)run->block * run->work->image.block;
    *high = *low + run->work->image.block;
    if (*high > positions)
        *high = positions;
}

static int64_t row_at(const struct run *run, int64_t position)
{
    return LOAD((int64_t *)arguments(run)[ROWS] + position);
}

static bool is_head(const struct run *run, int64_t position)
{
    return position == 0 || row_at(run, position) != row_at(run, position - 1);
}

static int64_t width_of(const struct run *run)
{
    return arguments(run)[UNITS] * run->work->image.unit;
}

/* Tries to take the lock of a row, if it has one. */
static bool hold(struct run *run, int64_t row, int64_t locks, int64_t first, int64_t stripes)
{
    if (!run->work->image.locked || run->held)
        return true;
    int32_t *lock = (int32_t *)locks + ((first + row) & (stripes - 1)), free = 0;
    if (!__atomic_compare_exchange_n(lock, &free, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
        return false;
    run->held = lock;
    return true;
}

static void release(struct run *run)
{
    if (run->held)
        __atomic_store_n(run->held, 0, __ATOMIC_RELEASE);
    run->held = NULL;
}

/* ---- updates ---- */

#define DEFINE_ROWS(TYPE) \
    static TYPE sum_##TYPE(const struct run *run, int64_t position, int64_t column) \
    { \
        int64_t width = width_of(run), row = row_at(run, position); \
        TYPE *grads = (TYPE *)arguments(run)[ROW_GRADS], sum = 0; \
        int64_t *order = (int64_t *)arguments(run)[ORDER]; \
        for (int64_t i = position; i < arguments(run)[POSITIONS] && row_at(run, i) == row; i++) { \
            TYPE g = LOAD(grads + LOAD(order + i) * width + column); \
            sum = i == position ? g : sum + g; \
        } \
        return sum; \
    } \
    static void compute_row_##TYPE(struct run *run, int64_t position, int64_t at) \
    { \
        const int64_t *a = arguments(run); \
        const struct image *image = &run->work->image; \
        struct factors_##TYPE factors = factors_of_##TYPE(image, a + ROW_LR); \
        int64_t width = width_of(run); \
        for (int64_t column = 0; column < width; column++) { \
            int64_t i = row_at(run, position) * width + column, to = at * width + column; \
            TYPE p = LOAD((TYPE *)a[ROW_PARAM] + i), ms = LOAD((TYPE *)a[ROW_MS] + i); \
            TYPE ga = image->centered ? LOAD((TYPE *)a[ROW_GRAD_AVG] + i) : 0; \
            TYPE buf = image->momentum ? LOAD((TYPE *)a[ROW_BUFFER] + i) : 0; \
            TYPE g = sum_##TYPE(run, position, column); \
            update_##TYPE(image, &factors, g, &p, &ms, &ga, &buf); \
            ((TYPE *)run->param)[to] = p; \
            ((TYPE *)run->ms)[to] = ms; \
            ((TYPE *)run->grad_avg)[to] = ga; \
            ((TYPE *)run->buffer)[to] = buf; \
        } \
    } \
    static void store_row_##TYPE(struct run *run, int64_t position, int64_t at) \
    { \
        const int64_t *a = arguments(run); \
        const struct image *image = &run->work->image; \
        int64_t width = width_of(run); \
        for (int64_t column = 0; column < width; column++) { \
            int64_t i = row_at(run, position) * width + column, from = at * width + column; \
            STORE((TYPE *)a[ROW_MS] + i, ((TYPE *)run->ms)[from]); \
            if (image->centered) \
                STORE((TYPE *)a[ROW_GRAD_AVG] + i, ((TYPE *)run->grad_avg)[from]); \
            if (image->momentum) \
                STORE((TYPE *)a[ROW_BUFFER] + i, ((TYPE *)run->buffer)[from]); \
            STORE((TYPE *)a[ROW_PARAM] + i, ((TYPE *)run->param)[from]); \
        } \
    }

DEFINE_ROWS(float)
DEFINE_ROWS(double)

static int64_t *count_of(const struct run *run, int64_t row, int which)
{
    return (int64_t *)arguments(run)[ROW_COUNTS] + which * arguments(run)[TABLE_ROWS] + row;
}

static void compute_tile(struct run *run, int64_t low, int64_t high)
{
    for (int64_t position = low; position < high; position++) {
        if (!is_head(run, position))
            continue;
        if (run->work->image.counted) {
            int64_t row = row_at(run, position);
            run->versions[position - low] = __atomic_load_n(count_of(run, row, 0), __ATOMIC_ACQUIRE);
            run->witnesses[position - low] =
                __atomic_load_n(count_of(run, row, 1), __ATOMIC_ACQUIRE);
        }
        (run->work->image.float64 ? compute_row_double : compute_row_float)(run, position,
                                                                            position - low);
    }
}

static void store_tile(struct run *run, int64_t low, int64_t high)
{
    for (int64_t position = low; position < high; position++) {
        if (!is_head(run, position))
            continue;
        (run->work->image.float64 ? store_row_double : store_row_float)(run, position,
                                                                        position - low);
        if (!run->work->image.counted)
            continue;
        int64_t row = row_at(run, position), at = position - low;
        __atomic_store_n(count_of(run, row, 1), run->witnesses[at] + 1, __ATOMIC_RELEASE);
        int64_t overlapping =
            __atomic_fetch_add(count_of(run, row, 0), 1, __ATOMIC_ACQ_REL) - run->versions[at];
        if (overlapping)
            __atomic_fetch_add(count_of(run, row, 2), overlapping, __ATOMIC_RELAXED);
    }
}

static bool is_outside(int64_t row, int64_t table_rows)
{
    return row < 0 || row >= table_rows;
}

static bool step_update(struct run *run)
{
    const int64_t *a = arguments(run);
    int64_t low, high, last = row_at(run, a[POSITIONS] - 1);
    tile_of(run, &low, &high);
    if (!run->computed) {
        bool outside = is_outside(row_at(run, 0), a[TABLE_ROWS]) || is_outside(last, a[TABLE_ROWS]);
        if (run->block == 0)
            STORE((int32_t *)a[ROW_VERDICT], outside);
        if (outside || (run->work->image.checked && LOAD((int32_t *)a[FOUND_INF])))
            return true;
        if (run->work->image.locked && !is_head(run, low))
            return true;
        if (!hold(run, row_at(run, low), a[LOCKS], a[FIRST_LOCK], a[STRIPES]))
            return false;
        compute_tile(run, low, high);
        run->computed = true;
        return false;
    }
    store_tile(run, low, high);
    run->computed = false;
    release(run);
    return true;
}

/* ---- what is looked at, and copied ---- */

static void look_at_range(const int64_t *a)
{
    int64_t *rows = (int64_t *)a[RANGE_ROWS], last = LOAD(rows + a[RANGE_POSITIONS] - 1);
    if (is_outside(LOAD(rows), a[RANGE_TABLE_ROWS]) || is_outside(last, a[RANGE_TABLE_ROWS]))
        STORE((int32_t *)a[RANGE_VERDICT], OUTSIDE);
}

/* Copies the columns of a row from one to another. */
static void copy_part(const struct run *run, int64_t position, int64_t row, int64_t from,
                      int64_t to)
{
    const int64_t *a = arguments(run);
    int64_t width = a[COPY_UNITS] * run->work->image.unit;
    for (int64_t column = from; column < to; column++) {
        int64_t source = row * width + column, target = position * width + column;
        if (run->work->image.float64)
            STORE((int64_t *)a[COPIES] + target, LOAD((int64_t *)a[COPY_TABLE] + source));
        else
            STORE((int32_t *)a[COPIES] + target, LOAD((int32_t *)a[COPY_TABLE] + source));
    }
}

static bool step_copy(struct run *run)
{
    const int64_t *a = arguments(run);
    int64_t low, high, width = a[COPY_UNITS] * run->work->image.unit;
    tile_of(run, &low, &high);
    for (int64_t position = low; position < high; position++) {
        int64_t row = LOAD((int64_t *)a[COPY_ROWS] + position);
        if (is_outside(row, a[COPY_TABLE_ROWS])) {
            STORE((int32_t *)a[COPY_VERDICT], OUTSIDE);
            continue;
        }
        if (!hold(run, row, a[COPY_LOCKS], a[COPY_FIRST_LOCK], a[COPY_STRIPES]))
            return false;
        if (run->computed)
            copy_part(run, position, row, width / 2, width);
        else
            copy_part(run, position, row, 0, width / 2);
    }
    run->computed = !run->computed;
    if (run->computed)
        return false;
    release(run);
    return true;
}

void begin_rows(struct run *run)
{
    if (run->work->image.kernel != ROW_RMSPROP_KERNEL)
        return;
    size_t positions = (size_t)run->work->image.block;
    size_t bytes = positions * (size_t)width_of(run) * (run->work->image.float64 ? 8 : 4);
    run->param = malloc(bytes);
    run->ms = malloc(bytes);
    run->grad_avg = malloc(bytes);
    run->buffer = malloc(bytes);
    run->versions = malloc(positions * sizeof *run->versions);
    run->witnesses = malloc(positions * sizeof *run->witnesses);
}

bool step_rows(struct run *run)
{
    switch (run->work->image.kernel) {
    case ROW_RMSPROP_KERNEL:
        return step_update(run);
    case ROW_COPY_KERNEL:
        return step_copy(run);
    default:
        look_at_range(arguments(run));
        return true;
    }
}
