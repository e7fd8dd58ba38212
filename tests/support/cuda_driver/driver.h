/* A CUDA driver over CPU memory, for tests: what its parts share.
 *
 *   calls.c         the driver's functions, and what their handles stand for; others in
 *   work.c          launches, copies, memory and modules, and in
 *   graphs.c        graphs
 *   streams.c       operations in the order of their streams, by a thread for each
 *   counted_time.c  or each in the time that it takes a device
 *   kernels.c       what kernels, copies and memsets do, a step at a time; those of rows in
 *   rows.c
 *   checks.c        violations: what hardware would crash on, or silently compute wrongly
 *   harness.c       what a test may ask and do besides
 *
 * One mutex guards everything. It is not held while memory that operations work on is touched, nor
 * while the host or a stream's thread is delayed.
 */

#ifndef DRIVER_H
#define DRIVER_H

#define _GNU_SOURCE /* adaptive mutexes */

#include <cuda.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#undef cuEventElapsedTime /* the header of CUDA 13 means its second version, which lanes do not */

/* Every function that there is; errors are injected, and calls counted, by name. */
#define FUNCTIONS(X) \
    X(cuInit) X(cuDeviceGet) X(cuDeviceGetAttribute) X(cuDevicePrimaryCtxRetain) \
    X(cuCtxPushCurrent) X(cuCtxPopCurrent) X(cuCtxGetStreamPriorityRange) \
    X(cuThreadExchangeStreamCaptureMode) X(cuGetErrorName) \
    X(cuStreamCreateWithPriority) X(cuStreamDestroy) X(cuStreamQuery) X(cuStreamSynchronize) \
    X(cuStreamIsCapturing) \
    X(cuStreamWaitEvent) X(cuStreamWriteValue64) \
    X(cuEventCreate) X(cuEventRecord) X(cuEventQuery) X(cuEventSynchronize) \
    X(cuEventElapsedTime) X(cuEventDestroy) \
    X(cuLaunchKernel) X(cuMemsetD32Async) X(cuMemcpyDtoHAsync) X(cuMemcpyDtoDAsync) \
    X(cuMemHostAlloc) X(cuMemHostGetDevicePointer) X(cuMemFreeHost) X(cuMemAlloc) X(cuMemFree) \
    X(cuModuleLoadData) X(cuModuleGetFunction) \
    X(cuGraphCreate) X(cuGraphDestroy) X(cuGraphAddKernelNode) X(cuGraphAddMemsetNode) \
    X(cuGraphInstantiateWithFlags) X(cuGraphLaunch) X(cuGraphExecDestroy)

enum function {
#define NUMBER(name) CALL_##name,
    FUNCTIONS(NUMBER)
#undef NUMBER
    CALLS
};

#pragma GCC visibility push(hidden)

enum {
    MAX_STREAMS = 128,   /* in use since the reset */
    MAX_ARGUMENTS = 30,  /* of a kernel, without the two scratch pointers that Triton adds */
    REMEMBERED = 256     /* operations of a stream whose end is remembered: a power of 2 */
};

#define NEVER INT64_MAX

/* How many operations of each stream, by its slot, something comes after. */
typedef uint32_t clock_of[MAX_STREAMS];

/* The first `count` operations of a stream: what an event stands for. */
struct point {
    struct stream *stream; /* NULL for nothing, which is done */
    uint32_t count;
};

/* A kernel as a test's image has it; see image_of in cuda_testing.py. */
enum kernel {
    RMSPROP_KERNEL, FINITE_KERNEL, FILL_KERNEL,
    ROW_RMSPROP_KERNEL, ROW_RANGE_KERNEL, ROW_COPY_KERNEL, /* those of rows come last */
    KERNELS
};

struct image {
    char magic[8];
    int32_t kernel;
    int32_t float64; /* else float32 */
    int32_t eps_inside_sqrt, coupled, centered, momentum, lr_in_momentum;
    int32_t lr_on_device, checked, counted, locked;
    int32_t unit;  /* of rows: as how many elements their width is given */
    int32_t block; /* how many elements a program takes, or positions of rows */
    int64_t exponent;
};

/* What an operation, or a node of a graph, does. */
struct work {
    enum { KERNEL, MEMSET, COPY, WRITE_VALUE } kind;
    struct image image; /* of a kernel; and its arguments, and how many programs run it */
    int64_t arguments[MAX_ARGUMENTS];
    uint32_t programs;
    uint64_t target, source, value; /* of the others */
    size_t bytes, element;          /* of memory, and of one element of a memset */
};

struct node {
    struct work work;
    uint64_t *after; /* a bit for each earlier node that comes before it, by whatever path */
};

struct graph {
    uint64_t number;
    size_t count, capacity;
    struct node *nodes; /* each after those that it depends on */
};

struct exec {
    struct exec *next;  /* of those destroyed, which may be under way */
    struct graph graph; /* a copy */
    bool checked;       /* for races among its nodes */
    struct point last;  /* launch */
    clock_of clock;     /* of that launch */
};

struct event {
    uint64_t number;
    bool timed;
    struct point record; /* the latest */
    uint32_t *clock;     /* of that record, if there are checks */
    int64_t time;        /* when it was done, in ns */
    unsigned waiting;    /* operations that wait for it and are pending */
};

struct operation {
    struct operation *next;
    enum { WAIT, RECORD, WORK, GRAPH } kind;
    uint32_t number;    /* in its stream, from 1 */
    int64_t called, begun; /* when, in ns; the latter in counted time, or 0 */
    struct point after; /* what it waits for */
    CUevent event;      /* of a wait or record */
    struct work work;
    struct exec *exec;
    uint32_t *clock; /* of a WRITE_VALUE, if there are checks */
};

struct stream {
    uint64_t number; /* 0 is the default stream */
    unsigned flags;
    bool held;
    bool captured; /* nothing more is modelled of captures */
    /* All below: since the reset. */
    int slot; /* among those in use, or -1 */
    struct operation *first, *last;
    uint32_t issued, done; /* operations */
    clock_of clock;        /* what its next operation comes after */
    pthread_t thread;
    pthread_cond_t wake;
    uint64_t random; /* state of its generator */
    unsigned pace;   /* its longest delay, in us */
    int64_t ready;   /* when it may go on, in ns of counted time */
    int64_t ended[REMEMBERED];
};

/* As the harness has it. */
struct settings {
    uint64_t seed;
    int32_t timed, aborts, logs;
    int64_t update_ns, serial_ns, dispatch_ns, crossing_ns;       /* of the device */
    int64_t launch_ns, graph_ns, record_ns, wait_ns, write_ns; /* of the calling thread */
};

enum handles { STREAMS = 1, EVENTS, MODULES, GRAPHS, NODES, EXECS, HANDLE_KINDS };

struct table {
    void **items; /* NULL for what was destroyed */
    size_t count, capacity;
};

struct state {
    pthread_mutex_t lock;
    pthread_cond_t host; /* waits for operations to be done */
    unsigned hosts;      /* threads that do */
    bool initialized, open, stopping, lost;
    struct settings settings;
    uint64_t calls[CALLS];
    uint64_t streams_destroyed;
    struct table tables[HANDLE_KINDS];
    struct stream default_stream; /* and all others are kept for the life of the process */
    struct stream *in_use[MAX_STREAMS]; /* by slot */
    int slots;
    clock_of host_clock;
};

extern struct state state;

static inline void lock(void)
{
    pthread_mutex_lock(&state.lock);
}

static inline void unlock(void)
{
    pthread_mutex_unlock(&state.lock);
}

extern bool forked; /* this is a child of the process that the driver ran in */

/* calls.c */
extern const char *const function_names[CALLS];
void *item_of(enum handles kind, const void *handle); /* NULL if it is unknown or destroyed */
void inject(enum function function, uint64_t nth, CUresult error);
void open_calls(void);
void close_calls(void); /* reports what was not destroyed, and destroys it */

/* streams.c */
void open_streams(void);
void close_streams(void);
void *grown(void *items, size_t count, size_t *capacity, size_t size); /* has room for one more */
void join_use(struct stream *stream); /* gives it a slot, if it has none */
struct operation *new_operation(struct stream *stream, int kind);
void enqueue(struct stream *stream, struct operation *operation);
bool is_done(struct point point);
CUresult wait_until_done(struct point point);
bool is_kernel(const struct operation *operation);
bool is_write(const struct operation *operation);
/* The first operation of a stream is done, which took from one time to another. */
void finish(struct stream *stream, int64_t begun, int64_t time);

/* counted_time.c */
int64_t now_ns(void);
void spend(int64_t ns); /* keeps the calling thread busy */
void start_device(void);
void tell_device(void); /* that there may be more to do */
void end_device(void);

/* kernels.c */
extern const char *const kernel_names[KERNELS];
extern const int kernel_arguments[KERNELS];
/* Arguments of rmsprop_kernel, as triton_kernels.py has them; all others begin with an address
 * and a count of elements, finite_kernel with a verdict after them, fill_kernel with an element.
 * Of no account here: COMP, KEY and FACTOR, as lanes neither compensate, round by chance nor scale. */
enum argument {
    PARAM, GRAD, MS, GRAD_AVG, BUFFER, COMP, ELEMENTS,
    LR, ALPHA, BETA, EPS, WEIGHT_DECAY, DECAY, SIGN, MOMENTUM, KEY, FACTOR, VERDICT, COUNTS
};
int64_t elements_of(const struct work *work); /* of a kernel; of rows, positions */

/* Arguments of the kernels of rows, as triton_row_kernels.py and triton_row_access.py have them. */
enum row_argument {
    ROW_PARAM, ROW_GRADS, ROW_MS, ROW_GRAD_AVG, ROW_BUFFER, ROW_COMP, LAST_UPDATE, ROWS, ORDER,
    POSITIONS, TABLE_ROWS, UNITS, UPDATE_NUMBER, NUMBER_BITS,
    ROW_LR, ROW_ALPHA, ROW_BETA, ROW_EPS, ROW_WEIGHT_DECAY, ROW_DECAY, ROW_SIGN, ROW_MOMENTUM,
    ROW_KEY, ROW_FACTOR, FOUND_INF, ROW_VERDICT, ROW_COUNTS, LOCKS, FIRST_LOCK, STRIPES
};
enum range_argument { RANGE_ROWS, RANGE_POSITIONS, RANGE_TABLE_ROWS, RANGE_VERDICT };
enum copy_argument {
    COPY_TABLE, COPIES, COPY_ROWS, COPY_POSITIONS, COPY_TABLE_ROWS, COPY_UNITS, COPY_VERDICT,
    COPY_LOCKS, COPY_FIRST_LOCK, COPY_STRIPES
};
enum { NONFINITE = 1, OUTSIDE = 2 }; /* verdicts */

struct run { /* of a work */
    const struct work *work;
    uint32_t block; /* the next one */
    bool computed;  /* but not stored: what it read may be overwritten meanwhile */
    int64_t version, witness;
    void *param, *ms, *grad_avg, *buffer; /* what was computed */
    int64_t *versions, *witnesses;        /* of rows, one for each position of a tile */
    int32_t *held;                        /* the lock of a row, if it is held */
};
void begin(struct run *run, const struct work *work);
bool step(struct run *run); /* whether that was the last */
void do_at_once(const struct work *work); /* what is not a kernel */

/* rows.c */
void begin_rows(struct run *run);
bool step_rows(struct run *run); /* whether the next of its programs is through */
const char *name_of(const struct work *work);

/* checks.c */
void violation(bool fatal, const char *format, ...) __attribute__((format(printf, 2, 3)));
void open_checks(void);
void close_checks(void);
void join(clock_of clock, const clock_of other);
/* Notes what an operation touches. Races are looked for, and use of memory that was freed. */
void note_accesses(struct stream *stream, struct operation *operation);
void note_allocation(uint64_t address, size_t bytes, bool host);
bool is_pinned(uint64_t address);
/* Memory stays readable until the driver is closed. */
CUresult note_free(uint64_t address, bool host);

#pragma GCC visibility pop

#endif
