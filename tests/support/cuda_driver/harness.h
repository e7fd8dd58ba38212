/* What cuda_testing.py calls. */

#ifndef HARNESS_H
#define HARNESS_H

#include <stdint.h>

struct settings;

/* An operation as it was executed; times are in ns, of counted time if that is what there is. */
struct entry {
    uint64_t stream; /* number */
    uint64_t number; /* of the operation in its stream */
    const char *name;
    int64_t called, started, ended;
};

void test_open(const struct settings *settings);
void test_close(void);

uint64_t test_violations(void);
const char *test_violation(uint64_t number);
void test_allow_races(uint64_t address, uint64_t bytes);
void test_host_write(uint64_t address, uint64_t bytes, int poison);

int test_functions(void);
const char *test_function(int number);
uint64_t test_calls(int function);
void test_fail(int function, uint64_t nth, int error);
void test_lose(void);

/* Of a stream, by its handle; 0 if there is none such. */
int test_hold(uint64_t stream, int held);
int test_capture(uint64_t stream, int captured);
int test_wait_idle(uint64_t stream);

/* 0: streams that exist; 1: that were destroyed; 2: modules. */
uint64_t test_count(int what);
uint64_t test_entries(void);
struct entry test_entry(uint64_t number);

#endif
