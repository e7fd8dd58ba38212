/* The driver's functions, and what their handles stand for.
 *
 * Handles are numbers, not addresses, and none is given out twice: one that is unknown or was
 * destroyed is found out without a look at memory.
 */

#include "calls.h"

#include <stdlib.h>
#include <string.h>

#define STRING(name) #name
#define EXPORTED(name) STRING(name), /* with its version, as the header has it */
const char *const function_names[CALLS] = {FUNCTIONS(EXPORTED)};

bool forked;

static const char *current; /* the function that is called */
static char the_context;

static _Thread_local int contexts; /* that are current on the thread, one above the other */

struct injected {
    enum function function;
    uint64_t nth;
    CUresult error;
};

static struct {
    struct injected *items;
    size_t count, capacity;
} injections;

static void note_fork(void)
{
    forked = true;
}

__attribute__((constructor)) static void prepare(void)
{
    pthread_atfork(NULL, NULL, note_fork);
}

/* ---- what each function begins and ends with ---- */

void inject(enum function function, uint64_t nth, CUresult error)
{
    injections.items = grown(injections.items, injections.count, &injections.capacity,
                             sizeof *injections.items);
    injections.items[injections.count++] = (struct injected){function, nth, error};
}

static CUresult refusal(enum function function)
{
    uint64_t nth = ++state.calls[function];
    for (size_t i = 0; i < injections.count; i++)
        if (injections.items[i].function == function && injections.items[i].nth == nth)
            return injections.items[i].error;
    if (function == CALL_cuGetErrorName)
        return CUDA_SUCCESS;
    if (!state.open)
        return CUDA_ERROR_DEINITIALIZED;
    if (state.lost)
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    return state.initialized || function == CALL_cuInit ? CUDA_SUCCESS
                                                        : CUDA_ERROR_NOT_INITIALIZED;
}

CUresult enter(enum function function)
{
    if (forked)
        return CUDA_ERROR_NOT_INITIALIZED;
    lock();
    current = function_names[function];
    CUresult result = refusal(function);
    if (result)
        unlock();
    return result;
}

CUresult leave(CUresult result)
{
    unlock();
    return result;
}

const char *called(void)
{
    return current;
}

/* ---- handles ---- */

static const char *const kinds[] = {[STREAMS] = "stream", [EVENTS] = "event",
                                    [MODULES] = "module or function", [GRAPHS] = "graph",
                                    [NODES] = "node", [EXECS] = "executable graph"};

static uint64_t base(enum handles kind)
{
    return (uint64_t)(0x7E570 + kind) << 32;
}

void *handle_for(enum handles kind, void *item)
{
    struct table *table = &state.tables[kind];
    table->items = grown(table->items, table->count, &table->capacity, sizeof *table->items);
    table->items[table->count++] = item;
    return (void *)(base(kind) + table->count);
}

static void **place_of(enum handles kind, const void *handle)
{
    struct table *table = &state.tables[kind];
    uint64_t number = (uint64_t)handle - base(kind);
    return number >= 1 && number <= table->count ? &table->items[number - 1] : NULL;
}

void *item_of(enum handles kind, const void *handle)
{
    void **place = place_of(kind, handle);
    return place ? *place : NULL;
}

void *find(enum handles kind, const void *handle)
{
    void **place = place_of(kind, handle);
    if (place && *place)
        return *place;
    violation(true, "%s is given %s %s that %s", current, strchr("aeiou", *kinds[kind]) ? "an" : "a",
              kinds[kind], place ? "was destroyed" : "is unknown");
    return NULL;
}

void *take(enum handles kind, const void *handle)
{
    void *item = find(kind, handle);
    if (item)
        *place_of(kind, handle) = NULL;
    return item;
}

CUresult find_stream(CUstream handle, struct stream **stream)
{
    if (handle == NULL || handle == CU_STREAM_LEGACY) {
        *stream = &state.default_stream;
        return contexts ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
    }
    *stream = find(STREAMS, handle);
    return *stream ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

/* ---- devices and contexts ---- */

bool has_context(void)
{
    return contexts > 0;
}

bool is_context(CUcontext context)
{
    return context == (CUcontext)&the_context;
}

CUresult cuInit(unsigned flags)
{
    ENTER(cuInit);
    LEAVE_IF(flags, CUDA_ERROR_INVALID_VALUE);
    state.initialized = true;
    return leave(CUDA_SUCCESS);
}

CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    ENTER(cuDeviceGet);
    LEAVE_IF(ordinal != 0, CUDA_ERROR_INVALID_DEVICE);
    *device = 0;
    return leave(CUDA_SUCCESS);
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
    ENTER(cuDeviceGetAttribute);
    LEAVE_IF(device != 0, CUDA_ERROR_INVALID_DEVICE);
    switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
        *value = 9;
        break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
        *value = 0;
        break;
    case CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS:
        *value = 1;
        break;
    default:
        return leave(CUDA_ERROR_INVALID_VALUE);
    }
    return leave(CUDA_SUCCESS);
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    ENTER(cuDevicePrimaryCtxRetain);
    LEAVE_IF(device != 0, CUDA_ERROR_INVALID_DEVICE);
    *context = (CUcontext)&the_context;
    return leave(CUDA_SUCCESS);
}

CUresult cuCtxPushCurrent(CUcontext context)
{
    ENTER(cuCtxPushCurrent);
    if (!is_context(context)) {
        violation(true, "%s is given a context that is unknown", current);
        return leave(CUDA_ERROR_INVALID_CONTEXT);
    }
    contexts++;
    return leave(CUDA_SUCCESS);
}

CUresult cuCtxPopCurrent(CUcontext *context)
{
    ENTER(cuCtxPopCurrent);
    NEED_CONTEXT;
    contexts--;
    if (context)
        *context = (CUcontext)&the_context;
    return leave(CUDA_SUCCESS);
}

CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest)
{
    ENTER(cuCtxGetStreamPriorityRange);
    NEED_CONTEXT;
    *least = 0;
    *greatest = -5;
    return leave(CUDA_SUCCESS);
}

/* Nothing is captured here: a thread's mode is remembered alone. */
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode)
{
    static _Thread_local CUstreamCaptureMode of_thread = CU_STREAM_CAPTURE_MODE_GLOBAL;
    ENTER(cuThreadExchangeStreamCaptureMode);
    CUstreamCaptureMode before = of_thread;
    of_thread = *mode;
    *mode = before;
    return leave(CUDA_SUCCESS);
}

CUresult cuGetErrorName(CUresult error, const char **name)
{
#define KNOWN(code) \
    case code: \
        *name = #code; \
        break;
    ENTER(cuGetErrorName);
    switch ((int)error) {
        KNOWN(CUDA_SUCCESS)
        KNOWN(CUDA_ERROR_INVALID_VALUE)
        KNOWN(CUDA_ERROR_OUT_OF_MEMORY)
        KNOWN(CUDA_ERROR_NOT_INITIALIZED)
        KNOWN(CUDA_ERROR_DEINITIALIZED)
        KNOWN(CUDA_ERROR_INVALID_DEVICE)
        KNOWN(CUDA_ERROR_INVALID_IMAGE)
        KNOWN(CUDA_ERROR_INVALID_CONTEXT)
        KNOWN(CUDA_ERROR_INVALID_HANDLE)
        KNOWN(CUDA_ERROR_NOT_FOUND)
        KNOWN(CUDA_ERROR_NOT_READY)
        KNOWN(CUDA_ERROR_ILLEGAL_ADDRESS)
        KNOWN(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
        KNOWN(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES)
        KNOWN(CUDA_ERROR_LAUNCH_FAILED)
        KNOWN(CUDA_ERROR_NOT_SUPPORTED)
        KNOWN(CUDA_ERROR_UNKNOWN)
    default:
        *name = NULL;
        return leave(CUDA_ERROR_INVALID_VALUE);
    }
    return leave(CUDA_SUCCESS);
}

/* ---- streams ---- */

CUresult cuStreamCreateWithPriority(CUstream *handle, unsigned flags, int priority)
{
    (void)priority; /* any is allowed, and all run alike */
    ENTER(cuStreamCreateWithPriority);
    NEED_CONTEXT;
    LEAVE_IF(flags & ~(unsigned)CU_STREAM_NON_BLOCKING, CUDA_ERROR_INVALID_VALUE);
    struct stream *stream = calloc(1, sizeof *stream);
    stream->number = state.tables[STREAMS].count + 1;
    stream->flags = flags;
    stream->slot = -1;
    *handle = handle_for(STREAMS, stream);
    return leave(CUDA_SUCCESS);
}

/* What is pending goes on. */
CUresult cuStreamDestroy(CUstream handle)
{
    ENTER(cuStreamDestroy);
    LEAVE_IF(!take(STREAMS, handle), CUDA_ERROR_INVALID_HANDLE);
    state.streams_destroyed++;
    return leave(CUDA_SUCCESS);
}

CUresult cuStreamQuery(CUstream handle)
{
    ENTER(cuStreamQuery);
    struct stream *stream;
    CUresult result = find_stream(handle, &stream);
    LEAVE_IF(result, result);
    LEAVE_IF(stream->done < stream->issued, CUDA_ERROR_NOT_READY);
    join(state.host_clock, stream->clock);
    return leave(CUDA_SUCCESS);
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus *status)
{
    ENTER(cuStreamIsCapturing);
    struct stream *stream;
    CUresult result = find_stream(handle, &stream);
    LEAVE_IF(result, result);
    *status = stream->captured ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    return leave(CUDA_SUCCESS);
}

CUresult cuStreamSynchronize(CUstream handle)
{
    ENTER(cuStreamSynchronize);
    struct stream *stream;
    CUresult result = find_stream(handle, &stream);
    LEAVE_IF(result, result);
    clock_of clock;
    memcpy(clock, stream->clock, sizeof clock);
    result = wait_until_done((struct point){stream, stream->issued});
    if (!result)
        join(state.host_clock, clock);
    return leave(result);
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned flags)
{
    spend(state.settings.wait_ns);
    ENTER(cuStreamWaitEvent);
    struct stream *stream;
    CUresult result = find_stream(handle, &stream);
    LEAVE_IF(result, result);
    struct event *event = find(EVENTS, event_handle);
    LEAVE_IF(!event, CUDA_ERROR_INVALID_HANDLE);
    LEAVE_IF(flags, CUDA_ERROR_INVALID_VALUE);
    struct operation *wait = new_operation(stream, WAIT);
    wait->event = event_handle;
    wait->after = event->record;
    event->waiting++;
    if (event->clock)
        join(stream->clock, event->clock);
    enqueue(stream, wait);
    return leave(CUDA_SUCCESS);
}

/* ---- events ---- */

CUresult cuEventCreate(CUevent *handle, unsigned flags)
{
    ENTER(cuEventCreate);
    NEED_CONTEXT;
    struct event *event = calloc(1, sizeof *event);
    event->number = state.tables[EVENTS].count + 1;
    event->timed = !(flags & CU_EVENT_DISABLE_TIMING);
    *handle = handle_for(EVENTS, event);
    return leave(CUDA_SUCCESS);
}

CUresult cuEventRecord(CUevent handle, CUstream stream_handle)
{
    spend(state.settings.record_ns);
    ENTER(cuEventRecord);
    struct stream *stream;
    CUresult result = find_stream(stream_handle, &stream);
    LEAVE_IF(result, result);
    struct event *event = find(EVENTS, handle);
    LEAVE_IF(!event, CUDA_ERROR_INVALID_HANDLE);
    if (stream->captured)
        violation(false, "an event is recorded on stream %llu, which is captured",
                  (unsigned long long)stream->number);
    struct operation *record = new_operation(stream, RECORD);
    record->event = handle;
    enqueue(stream, record);
    event->record = (struct point){stream, stream->issued};
    if (!state.settings.timed) {
        event->clock = event->clock ? event->clock : malloc(sizeof stream->clock);
        memcpy(event->clock, stream->clock, sizeof stream->clock);
    }
    return leave(CUDA_SUCCESS);
}

static void know_event(const struct event *event)
{
    if (event->clock)
        join(state.host_clock, event->clock);
}

CUresult cuEventQuery(CUevent handle)
{
    ENTER(cuEventQuery);
    struct event *event = find(EVENTS, handle);
    LEAVE_IF(!event, CUDA_ERROR_INVALID_HANDLE);
    LEAVE_IF(!is_done(event->record), CUDA_ERROR_NOT_READY);
    know_event(event);
    return leave(CUDA_SUCCESS);
}

CUresult cuEventSynchronize(CUevent handle)
{
    ENTER(cuEventSynchronize);
    struct event *event = find(EVENTS, handle);
    LEAVE_IF(!event, CUDA_ERROR_INVALID_HANDLE);
    clock_of clock = {0};
    if (event->clock)
        memcpy(clock, event->clock, sizeof clock);
    CUresult result = wait_until_done(event->record);
    if (!result)
        join(state.host_clock, clock);
    return leave(result);
}

CUresult cuEventElapsedTime(float *milliseconds, CUevent start_handle, CUevent end_handle)
{
    ENTER(cuEventElapsedTime);
    const struct event *start = find(EVENTS, start_handle), *end = find(EVENTS, end_handle);
    LEAVE_IF(!start || !end, CUDA_ERROR_INVALID_HANDLE);
    LEAVE_IF(!start->timed || !end->timed || !start->record.stream || !end->record.stream,
             CUDA_ERROR_INVALID_HANDLE);
    LEAVE_IF(!is_done(start->record) || !is_done(end->record), CUDA_ERROR_NOT_READY);
    *milliseconds = (float)((double)(end->time - start->time) / 1e6);
    return leave(CUDA_SUCCESS);
}

static void free_event(struct event *event)
{
    free(event->clock);
    free(event);
}

CUresult cuEventDestroy(CUevent handle)
{
    ENTER(cuEventDestroy);
    struct event *event = take(EVENTS, handle);
    LEAVE_IF(!event, CUDA_ERROR_INVALID_HANDLE);
    if (!is_done(event->record) || event->waiting)
        violation(false, "event %lu is destroyed while a stream has yet to %s it", event->number,
                  event->waiting ? "wait for" : "record");
    free_event(event);
    return leave(CUDA_SUCCESS);
}

/* ---- between tests ---- */

void open_calls(void)
{
    contexts = 0; /* a device that was lost takes back none of this thread's */
    memset(state.calls, 0, sizeof state.calls);
    injections.count = 0;
}

static void free_item(enum handles kind, void *item)
{
    if (kind == EVENTS) {
        free_event(item);
    } else if (kind == GRAPHS) {
        free_graph(item);
    } else if (kind == EXECS) {
        free_exec(item);
    } else {
        free(item);
    }
}

void close_calls(void)
{
    static const enum handles ended[] = {EVENTS, NODES, GRAPHS, EXECS};
    for (size_t i = 0; i < sizeof ended / sizeof *ended; i++) {
        struct table *table = &state.tables[ended[i]];
        size_t left = 0;
        for (size_t j = 0; j < table->count; j++) {
            if (!table->items[j])
                continue;
            left++;
            free_item(ended[i], table->items[j]);
            table->items[j] = NULL;
        }
        if (left && ended[i] != NODES && !state.lost)
            violation(false, "leak: %zu %ss were never destroyed", left, kinds[ended[i]]);
    }
    free_destroyed_execs();
}
