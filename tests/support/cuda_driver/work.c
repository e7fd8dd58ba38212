/* The driver's functions that launch, copy and set; memory; and modules. */

#include "calls.h"

#include <stdlib.h>
#include <string.h>

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

CUresult kernel_work(struct work *work, const CUDA_KERNEL_NODE_PARAMS *launch)
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
        violation(false, "%s: %s needs no scratch memory, but is given some", called(),
                  kernel_names[image->kernel]);
    int64_t elements = elements_of(work);
    if ((elements + image->block - 1) / image->block != work->programs)
        violation(false, "%s: %u programs of %s for %ld elements in blocks of %d", called(),
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
    NEED_CONTEXT;
    LEAVE_IF(!bytes || flags & ~7U, CUDA_ERROR_INVALID_VALUE);
    *memory = (void *)allocate(bytes, true);
    return leave(*memory ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY);
}

CUresult cuMemHostGetDevicePointer(CUdeviceptr *address, void *memory, unsigned flags)
{
    ENTER(cuMemHostGetDevicePointer);
    NEED_CONTEXT;
    LEAVE_IF(flags || !is_pinned((uint64_t)memory), CUDA_ERROR_INVALID_VALUE);
    *address = (CUdeviceptr)memory;
    return leave(CUDA_SUCCESS);
}

CUresult cuMemFreeHost(void *memory)
{
    ENTER(cuMemFreeHost);
    NEED_CONTEXT;
    return leave(note_free((uint64_t)memory, true));
}

CUresult cuMemAlloc(CUdeviceptr *address, size_t bytes)
{
    ENTER(cuMemAlloc);
    NEED_CONTEXT;
    LEAVE_IF(!bytes, CUDA_ERROR_INVALID_VALUE);
    *address = allocate(bytes, false);
    return leave(*address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY);
}

CUresult cuMemFree(CUdeviceptr address)
{
    ENTER(cuMemFree);
    NEED_CONTEXT;
    return leave(note_free(address, false));
}

/* ---- modules: one function each, which goes by the handle of its module ---- */

CUresult cuModuleLoadData(CUmodule *handle, const void *data)
{
    ENTER(cuModuleLoadData);
    NEED_CONTEXT;
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
