/* What each of the driver's functions begins and ends with, and handles. */

#ifndef CALLS_H
#define CALLS_H

#include "driver.h"

#pragma GCC visibility push(hidden)

/* Takes the lock if the call goes on. */
CUresult enter(enum function function);
CUresult leave(CUresult result);

#define ENTER(name) \
    do { \
        CUresult refused = enter(CALL_##name); \
        if (refused) \
            return refused; \
    } while (0)

#define LEAVE_IF(failed, result) \
    do { \
        if (failed) \
            return leave(result); \
    } while (0)

/* Fails a call, for which the lock was taken, if no context is current on the thread. */
#define NEED_CONTEXT LEAVE_IF(!has_context(), CUDA_ERROR_INVALID_CONTEXT)

bool has_context(void);
bool is_context(CUcontext context);

const char *called(void); /* the name of the function */

void *handle_for(enum handles kind, void *item);
void *find(enum handles kind, const void *handle); /* as item_of; it is a violation if NULL */
void *take(enum handles kind, const void *handle); /* as find, and there is none from now on */
CUresult find_stream(CUstream handle, struct stream **stream);

/* work.c */
CUresult kernel_work(struct work *work, const CUDA_KERNEL_NODE_PARAMS *launch);

/* graphs.c */
void free_graph(struct graph *graph);
void free_exec(struct exec *exec);
void free_destroyed_execs(void);

#pragma GCC visibility pop

#endif
