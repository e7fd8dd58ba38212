/* One element of a tensor: how it is read and written, and what an update makes of it. */

#ifndef ELEMENTS_H
#define ELEMENTS_H

#include "driver.h"

#include <math.h>
#include <string.h>

/* Elements are loaded and stored whole, as on a device, whoever else writes them. */
#define LOAD(address) \
    ({ __typeof__(*(address)) loaded; __atomic_load(address, &loaded, __ATOMIC_RELAXED); loaded; })
#define STORE(address, value) \
    ({ __typeof__(*(address)) stored = (value); __atomic_store(address, &stored, __ATOMIC_RELAXED); })

static inline double as_float64(int64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* What a kernel takes as its factors, from a place on, in their order; and the update. */
#define DEFINE_UPDATE(TYPE, SQRT) \
    struct factors_##TYPE { \
        TYPE lr, alpha, beta, eps, weight_decay, shrink, sign, momentum; \
    }; \
    static inline struct factors_##TYPE factors_of_##TYPE(const struct image *image, \
                                                          const int64_t *a) \
    { \
        double lr = image->lr_on_device ? LOAD((double *)a[0]) : as_float64(a[0]); \
        return (struct factors_##TYPE){ \
            (TYPE)lr, (TYPE)as_float64(a[1]), (TYPE)as_float64(a[2]), (TYPE)as_float64(a[3]), \
            (TYPE)as_float64(a[4]), (TYPE)(1.0 - lr * as_float64(a[5])), (TYPE)as_float64(a[6]), \
            (TYPE)as_float64(a[7])}; \
    } \
    static inline void update_##TYPE(const struct image *image, const struct factors_##TYPE *f, \
                                     TYPE g, TYPE *param, TYPE *mean, TYPE *grad_avg, \
                                     TYPE *buffer) \
    { \
        TYPE p = *param, ms = *mean; \
        g = g * f->sign; \
        if (image->coupled) \
            g = g + f->weight_decay * p; \
        p = p * f->shrink; \
        ms = f->alpha * ms + (f->beta * g) * g; \
        TYPE v = ms; \
        if (image->centered) { \
            TYPE ga = f->alpha * *grad_avg + f->beta * g; \
            v = ms - ga * ga; \
            v = v < 0 ? 0 : v; \
            *grad_avg = ga; \
        } \
        TYPE d = image->eps_inside_sqrt ? SQRT(v + f->eps) : SQRT(v) + f->eps; \
        TYPE step = (image->momentum && !image->lr_in_momentum ? g : f->lr * g) / d; \
        if (image->momentum) { \
            *buffer = f->momentum * *buffer + step; \
            step = image->lr_in_momentum ? *buffer : f->lr * *buffer; \
        } \
        *param = p - step; \
        *mean = ms; \
    }

DEFINE_UPDATE(float, sqrtf)
DEFINE_UPDATE(double, sqrt)

#endif
