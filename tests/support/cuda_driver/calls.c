/* The driver's functions, and what their handles stand for.
 *
 * Handles are numbers, not addresses, and none is given out twice: one that is unknown or was
 * destroyed is found out without a look at memory.
 */

#include "driver.h"

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

static struct exec *destroyed_execs;

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

/* Takes the lock if the call goes on. */
static CUresult enter(enum function function)
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

static CUresult leave(CUresult result)
{
    unlock();
    return result;
}

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

/* ---- handles ---- */

static const char *const kinds[] = {[STREAMS] = "stream", [EVENTS] = "event",
                                    [MODULES] = "module or function", [GRAPHS] = "graph",
                                    [NODES] = "node", [EXECS] = "executable graph"};

static uint64_t base(enum handles kind)
{
    return (uint64_t)(0x7E570 + kind) << 32;
}

static void *handle_for(enum handles kind, void *item)
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

/* As item_of, but it is a violation if there is none. */
static void *find(enum handles kind, const void *handle)
{
    void **place = place_of(kind, handle);
    if (place && *place)
        return *place;
    violation(true, "%s is given %s %s that %s", current, strchr("aeiou", *kinds[kind]) ? "an" : "a",
              kinds[kind], place ? "was destroyed" : "is unknown");
    return NULL;
}

static void *take(enum handles kind, const void *handle)
{
    void *item = find(kind, handle);
    if (item)
        *place_of(kind, handle) = NULL;
    return item;
}

static CUresult find_stream(CUstream handle, struct stream **stream)
{
    if (handle == NULL || handle == CU_STREAM_LEGACY) {
        *stream = &state.default_stream;
        return contexts ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
    }
    *stream = find(STREAMS, handle);
    return *stream ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

/* ---- devices and contexts ---- */

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
    if (context != (CUcontext)&the_context) {
        violation(true, "%s is given a context that is unknown", current);
        return leave(CUDA_ERROR_INVALID_CONTEXT);
    }
    contexts++;
    return leave(CUDA_SUCCESS);
}

CUresult cuCtxPopCurrent(CUcontext *context)
{
    ENTER(cuCtxPopCurrent);
    LEAVE_IF(!contexts, CUDA_ERROR_INVALID_CONTEXT);
    contexts--;
    if (context)
        *context = (CUcontext)&the_context;
    return leave(CUDA_SUCCESS);
}

CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest)
{
    ENTER(cuCtxGetStreamPriorityRange);
    LEAVE_IF(!contexts, CUDA_ERROR_INVALID_CONTEXT);
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
    LEAVE_IF(!contexts, CUDA_ERROR_INVALID_CONTEXT);
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
    LEAVE_IF(!contexts, CUDA_ERROR_INVALID_CONTEXT);
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

/* ---- work ---- */

static CUresult enqueue_work(CUstream handle, const struct work *work)
{
    struct stream *stream;
    CUresult result = find_stream(handle, &stream);
    if (result)
        return result;
    struct operation *operation = new_operation(stream, WORK);
    operation->work = *work;
    enqueue(stream, operation);
    return CUDA_SUCCESS;
}

static CUresult kernel_work(struct work *work, const CUDA_KERNEL_NODE_PARAMS *launch)
{
    const struct image *image = find(MODULES, launch->func);
    if (!image)
        return CUDA_ERROR_INVALID_HANDLE;
    uint64_t threads = (uint64_t)launch->blockDimX * launch->blockDimY * launch->blockDimZ;
    if (launch->gridDimX == 0 || launch->gridDimY != 1 || launch->gridDimZ != 1 || threads == 0 ||
        threads > 1024 || !launch->kernelParams || launch->extra)
        return CUDA_ERROR_INVALID_VALUE;
    *work = (struct work){.kind = KERNEL, .image = *image, .programs = launch->gridDimX};
    int count = kernel_arguments[image->kernel];
    for (int i = 0; i < count; i++)
        work->arguments[i] = *(int64_t *)launch->kernelParams[i];
    if (*(void **)launch->kernelParams[count] || *(void **)launch->kernelParams[count + 1])
        violation(false, "%s: %s needs no scratch memory, but is given some", current,
                  kernel_names[image->kernel]);
    int64_t elements = work->arguments[image->kernel == RMSPROP_KERNEL ? 3 : 1];
    if ((elements + image->block - 1) / image->block != work->programs)
        violation(false, "%s: %u programs of %s for %ld elements in blocks of %d", current,
                  work->programs, kernel_names[image->kernel], elements, image->block);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                        CUstream stream, void **arguments, void **extra)
{
    spend(state.settings.launch_ns);
    ENTER(cuLaunchKernel);
    CUDA_KERNEL_NODE_PARAMS launch = {function, grid_x, grid_y, grid_z, block_x, block_y, block_z,
                                      shared, arguments, extra, NULL, NULL};
    struct work work;
    CUresult result = kernel_work(&work, &launch);
    LEAVE_IF(result, result);
    return leave(enqueue_work(stream, &work));
}

CUresult cuMemsetD32Async(CUdeviceptr target, unsigned value, size_t count, CUstream stream)
{
    ENTER(cuMemsetD32Async);
    LEAVE_IF(target % 4, CUDA_ERROR_INVALID_VALUE);
    struct work work = {.kind = MEMSET, .target = target, .value = value, .bytes = 4 * count,
                        .element = 4};
    return leave(enqueue_work(stream, &work));
}

CUresult cuMemcpyDtoHAsync(void *target, CUdeviceptr source, size_t bytes, CUstream stream)
{
    ENTER(cuMemcpyDtoHAsync);
    struct work work = {.kind = COPY, .target = (uint64_t)target, .source = source, .bytes = bytes};
    return leave(enqueue_work(stream, &work));
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream)
{
    ENTER(cuMemcpyDtoDAsync);
    struct work work = {.kind = COPY, .target = target, .source = source, .bytes = bytes};
    return leave(enqueue_work(stream, &work));
}

CUresult cuStreamWriteValue64(CUstream stream, CUdeviceptr target, cuuint64_t value, unsigned flags)
{
    spend(state.settings.write_ns);
    ENTER(cuStreamWriteValue64);
    LEAVE_IF(target % 8 || flags != CU_STREAM_WRITE_VALUE_DEFAULT, CUDA_ERROR_INVALID_VALUE);
    struct work work = {.kind = WRITE_VALUE, .target = target, .value = value, .bytes = 8};
    return leave(enqueue_work(stream, &work));
}

/* ---- memory ---- */

static uint64_t allocate(size_t bytes, bool host)
{
    void *memory = aligned_alloc(256, (bytes + 255) & ~(size_t)255);
    if (memory)
        note_allocation((uint64_t)memory, bytes, host);
    return (uint64_t)memory;
}

CUresult cuMemHostAlloc(void **memory, size_t bytes, unsigned flags)
{
    ENTER(cuMemHostAlloc);
    LEAVE_IF(!contexts, CUDA_ERROR_INVALID_CONTEXT);
    LEAVE_IF(!bytes || flags & ~7U, CUDA_ERROR_INVALID_VALUE);
    *memory = (void *)allocate(bytes, true);
    return leave(*memory ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY);
}

CUresult cuMemHostGetDevicePointer(CUdeviceptr *address, void *memory, unsigned flags)
{
    ENTER(cuMemHostGetDevicePointer);
    LEAVE_IF(!contexts, CUDA_ERROR_INVALID_CONTEXT);
    LEAVE_IF(flags || !is_pinned((uint64_t)memory), CUDA_ERROR_INVALID_VALUE);
    *address = (CUdeviceptr)memory;
    return leave(CUDA_SUCCESS);
}

CUresult cuMemFreeHost(void *memory)
{
    ENTER(cuMemFreeHost);
    LEAVE_IF(!contexts, CUDA_ERROR_INVALID_CONTEXT);
    return leave(note_free((uint64_t)memory, true));
}

CUresult cuMemAlloc(CUdeviceptr *address, size_t bytes)
{
    ENTER(cuMemAlloc);
    LEAVE_IF(!contexts, CUDA_ERROR_INVALID_CONTEXT);
    LEAVE_IF(!bytes, CUDA_ERROR_INVALID_VALUE);
    *address = allocate(bytes, false);
    return leave(*address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY);
}

CUresult cuMemFree(CUdeviceptr address)
{
    ENTER(cuMemFree);
    LEAVE_IF(!contexts, CUDA_ERROR_INVALID_CONTEXT);
    return leave(note_free(address, false));
}

/* ---- modules: one function each, which goes by the handle of its module ---- */

CUresult cuModuleLoadData(CUmodule *handle, const void *data)
{
    ENTER(cuModuleLoadData);
    LEAVE_IF(!contexts, CUDA_ERROR_INVALID_CONTEXT);
    struct image *image = malloc(sizeof *image);
    memcpy(image, data, sizeof *image);
    if (memcmp(image->magic, "hogtests", sizeof image->magic) != 0) {
        free(image);
        return leave(CUDA_ERROR_INVALID_IMAGE);
    }
    *handle = handle_for(MODULES, image);
    return leave(CUDA_SUCCESS);
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
    ENTER(cuModuleGetFunction);
    const struct image *image = find(MODULES, module);
    LEAVE_IF(!image, CUDA_ERROR_INVALID_HANDLE);
    LEAVE_IF(strcmp(name, kernel_names[image->kernel]) != 0, CUDA_ERROR_NOT_FOUND);
    *function = (CUfunction)module;
    return leave(CUDA_SUCCESS);
}

/* ---- graphs ---- */

struct place { /* of a node, whose handle outlives its graph */
    uint64_t graph;
    size_t index;
};

CUresult cuGraphCreate(CUgraph *handle, unsigned flags)
{
    ENTER(cuGraphCreate);
    LEAVE_IF(flags, CUDA_ERROR_INVALID_VALUE);
    struct graph *graph = calloc(1, sizeof *graph);
    graph->number = state.tables[GRAPHS].count + 1;
    *handle = handle_for(GRAPHS, graph);
    return leave(CUDA_SUCCESS);
}

static void free_nodes(struct graph *graph)
{
    for (size_t i = 0; i < graph->count; i++)
        free(graph->nodes[i].after);
    free(graph->nodes);
}

CUresult cuGraphDestroy(CUgraph handle)
{
    ENTER(cuGraphDestroy);
    struct graph *graph = take(GRAPHS, handle);
    LEAVE_IF(!graph, CUDA_ERROR_INVALID_HANDLE);
    free_nodes(graph);
    free(graph);
    return leave(CUDA_SUCCESS);
}

static CUresult add_node(CUgraphNode *handle, CUgraph graph_handle, const CUgraphNode *others,
                         size_t count, const struct work *work)
{
    struct graph *graph = find(GRAPHS, graph_handle);
    if (!graph)
        return CUDA_ERROR_INVALID_HANDLE;
    uint64_t *after = calloc(graph->count / 64 + 1, sizeof *after);
    for (size_t i = 0; i < count; i++) {
        const struct place *place = find(NODES, others[i]);
        if (!place || place->graph != graph->number) {
            free(after);
            return CUDA_ERROR_INVALID_VALUE;
        }
        for (size_t word = 0; word <= place->index / 64; word++)
            after[word] |= graph->nodes[place->index].after[word];
        after[place->index / 64] |= UINT64_C(1) << (place->index % 64);
    }
    struct place *place = malloc(sizeof *place);
    *place = (struct place){graph->number, graph->count};
    *handle = handle_for(NODES, place);
    graph->nodes = grown(graph->nodes, graph->count, &graph->capacity, sizeof *graph->nodes);
    graph->nodes[graph->count++] = (struct node){*work, after};
    return CUDA_SUCCESS;
}

CUresult cuGraphAddKernelNode(CUgraphNode *node, CUgraph graph, const CUgraphNode *others,
                              size_t count, const CUDA_KERNEL_NODE_PARAMS *launch)
{
    ENTER(cuGraphAddKernelNode);
    struct work work;
    CUresult result = kernel_work(&work, launch);
    LEAVE_IF(result, result);
    return leave(add_node(node, graph, others, count, &work));
}

CUresult cuGraphAddMemsetNode(CUgraphNode *node, CUgraph graph, const CUgraphNode *others,
                              size_t count, const CUDA_MEMSET_NODE_PARAMS *memset,
                              CUcontext context)
{
    ENTER(cuGraphAddMemsetNode);
    LEAVE_IF(context != (CUcontext)&the_context, CUDA_ERROR_INVALID_CONTEXT);
    unsigned size = memset->elementSize;
    LEAVE_IF((size != 1 && size != 2 && size != 4) || memset->dst % size || memset->height != 1,
             CUDA_ERROR_INVALID_VALUE);
    struct work work = {.kind = MEMSET, .target = memset->dst, .value = memset->value,
                        .bytes = size * memset->width, .element = size};
    return leave(add_node(node, graph, others, count, &work));
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec *handle, CUgraph graph_handle,
                                     unsigned long long flags)
{
    ENTER(cuGraphInstantiateWithFlags);
    LEAVE_IF(!contexts, CUDA_ERROR_INVALID_CONTEXT);
    const struct graph *graph = find(GRAPHS, graph_handle);
    LEAVE_IF(!graph, CUDA_ERROR_INVALID_HANDLE);
    LEAVE_IF(flags, CUDA_ERROR_INVALID_VALUE);
    struct exec *exec = calloc(1, sizeof *exec);
    exec->graph = *graph;
    exec->graph.nodes = malloc((graph->count + 1) * sizeof *graph->nodes);
    for (size_t i = 0; i < graph->count; i++) {
        size_t bytes = (i / 64 + 1) * sizeof *graph->nodes[i].after;
        exec->graph.nodes[i] = (struct node){graph->nodes[i].work, malloc(bytes)};
        memcpy(exec->graph.nodes[i].after, graph->nodes[i].after, bytes);
    }
    *handle = handle_for(EXECS, exec);
    return leave(CUDA_SUCCESS);
}

CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream_handle)
{
    spend(state.settings.graph_ns);
    ENTER(cuGraphLaunch);
    struct stream *stream;
    CUresult result = find_stream(stream_handle, &stream);
    LEAVE_IF(result, result);
    struct exec *exec = find(EXECS, handle);
    LEAVE_IF(!exec, CUDA_ERROR_INVALID_HANDLE);
    struct operation *launch = new_operation(stream, GRAPH);
    launch->exec = exec;
    launch->after = exec->last;
    join(stream->clock, exec->clock);
    enqueue(stream, launch);
    exec->last = (struct point){stream, stream->issued};
    memcpy(exec->clock, stream->clock, sizeof exec->clock);
    return leave(CUDA_SUCCESS);
}

CUresult cuGraphExecDestroy(CUgraphExec handle)
{
    ENTER(cuGraphExecDestroy);
    struct exec *exec = take(EXECS, handle);
    LEAVE_IF(!exec, CUDA_ERROR_INVALID_HANDLE);
    exec->next = destroyed_execs;
    destroyed_execs = exec;
    return leave(CUDA_SUCCESS);
}

/* ---- between tests ---- */

void open_calls(void)
{
    memset(state.calls, 0, sizeof state.calls);
    injections.count = 0;
}

static void free_exec(struct exec *exec)
{
    free_nodes(&exec->graph);
    free(exec);
}

static void free_item(enum handles kind, void *item)
{
    if (kind == EVENTS) {
        free_event(item);
    } else if (kind == GRAPHS) {
        free_nodes(item);
        free(item);
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
    while (destroyed_execs) {
        struct exec *next = destroyed_execs->next;
        free_exec(destroyed_execs);
        destroyed_execs = next;
    }
}
