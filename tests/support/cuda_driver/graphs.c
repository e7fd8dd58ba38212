/* The driver's functions of graphs. */

#include "calls.h"

#include <stdlib.h>
#include <string.h>

static struct exec *destroyed_execs; /* which may be under way */

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

void free_graph(struct graph *graph)
{
    free_nodes(graph);
    free(graph);
}

CUresult cuGraphDestroy(CUgraph handle)
{
    ENTER(cuGraphDestroy);
    struct graph *graph = take(GRAPHS, handle);
    LEAVE_IF(!graph, CUDA_ERROR_INVALID_HANDLE);
    free_graph(graph);
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
    LEAVE_IF(!is_context(context), CUDA_ERROR_INVALID_CONTEXT);
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
    NEED_CONTEXT;
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

void free_exec(struct exec *exec)
{
    free_nodes(&exec->graph);
    free(exec);
}

void free_destroyed_execs(void)
{
    while (destroyed_execs) {
        struct exec *next = destroyed_execs->next;
        free_exec(destroyed_execs);
        destroyed_execs = next;
    }
}
