/* What a test may ask and do besides. */

#include "harness.h"
#include "driver.h"

#include <string.h>

void test_open(const struct settings *settings)
{
    lock();
    state.settings = *settings;
    state.open = true;
    state.lost = false;
    memset(state.host_clock, 0, sizeof state.host_clock);
    open_calls();
    open_checks();
    open_streams();
    unlock();
}

void test_close(void)
{
    close_streams();
    lock();
    close_calls();
    close_checks();
    state.open = false;
    unlock();
}

int test_functions(void)
{
    return CALLS;
}

const char *test_function(int number)
{
    return function_names[number];
}

uint64_t test_calls(int function)
{
    lock();
    uint64_t calls = state.calls[function];
    unlock();
    return calls;
}

void test_fail(int function, uint64_t nth, int error)
{
    lock();
    inject((enum function)function, nth, (CUresult)error);
    unlock();
}

void test_lose(void)
{
    lock();
    state.lost = true;
    pthread_cond_broadcast(&state.host);
    unlock();
}

static struct stream *known_stream(uint64_t handle)
{
    return handle ? item_of(STREAMS, (const void *)handle) : &state.default_stream;
}

int test_hold(uint64_t handle, int held)
{
    lock();
    struct stream *stream = known_stream(handle);
    if (stream) {
        join_use(stream);
        stream->held = held;
        pthread_cond_signal(&stream->wake);
        tell_device();
    }
    unlock();
    return stream != NULL;
}

int test_capture(uint64_t handle, int captured)
{
    lock();
    struct stream *stream = known_stream(handle);
    if (stream)
        stream->captured = captured;
    unlock();
    return stream != NULL;
}

int test_wait_idle(uint64_t handle)
{
    lock();
    struct stream *stream = known_stream(handle);
    if (stream)
        wait_until_done((struct point){stream, stream->issued});
    unlock();
    return stream != NULL;
}

uint64_t test_count(int what)
{
    lock();
    uint64_t counts[] = {state.tables[STREAMS].count, state.streams_destroyed,
                         state.tables[MODULES].count};
    unlock();
    return counts[what];
}
