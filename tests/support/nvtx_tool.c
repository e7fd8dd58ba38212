/* A tool for the NVIDIA Tools Extension, version 3: writes down the calls that it is told of.
 *
 * NVTX loads it from NVTX_INJECTION64_PATH and calls InitializeInjectionNvtx2. One line a call goes
 * to the file NVTX_LOG:
 *
 *   create DOMAIN NAME
 *   category DOMAIN CATEGORY NAME
 *   start RANGE DOMAIN CATEGORY PAYLOAD_TYPE PAYLOAD TEXT
 *   end RANGE DOMAIN
 *   stack                                 for a range that is pushed or popped
 */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of an event, as NVTX passes it. */
struct attributes {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type;
    int32_t reserved;
    int64_t payload;
    int32_t message_type;
    const char *message;
};

enum { CALLBACKS_TABLE = 1, DOMAIN_MODULE = 5 };
enum {
    RANGE_START = 2,
    RANGE_END = 3,
    RANGE_PUSH = 4,
    RANGE_POP = 5,
    NAME_CATEGORY = 8,
    REGISTER_STRING = 10,
    CREATE_DOMAIN = 12
};

typedef void (*function)(void);

struct callbacks {
    size_t size;
    int (*functions_of)(int module, function ***functions, unsigned *count);
};

static FILE *file;
static intptr_t domains;
static uint64_t ranges;

static intptr_t create_domain(const char *name)
{
    intptr_t domain = __atomic_add_fetch(&domains, 1, __ATOMIC_SEQ_CST);
    fprintf(file, "create %ld %s\n", (long)domain, name);
    return domain;
}

static const char *register_string(intptr_t domain, const char *text)
{
    (void)domain;
    return strdup(text); /* the handle of the string, which events carry */
}

static void name_category(intptr_t domain, uint32_t category, const char *name)
{
    fprintf(file, "category %ld %u %s\n", (long)domain, category, name);
}

static uint64_t start(intptr_t domain, const struct attributes *event)
{
    uint64_t range = __atomic_add_fetch(&ranges, 1, __ATOMIC_SEQ_CST);
    fprintf(file, "start %lu %ld %u %d %ld %s\n", (unsigned long)range, (long)domain,
            event->category, event->payload_type, (long)event->payload, event->message);
    return range;
}

static void end(intptr_t domain, uint64_t range)
{
    fprintf(file, "end %lu %ld\n", (unsigned long)range, (long)domain);
}

static int stack(void)
{
    fputs("stack\n", file);
    return 0;
}

int InitializeInjectionNvtx2(const void *(*table)(uint32_t))
{
    const struct callbacks *callbacks = table(CALLBACKS_TABLE);
    function **functions;
    unsigned count;
    if (!callbacks->functions_of(DOMAIN_MODULE, &functions, &count) || count <= CREATE_DOMAIN)
        return 0;
    file = fopen(getenv("NVTX_LOG"), "w");
    if (!file)
        return 0;
    setvbuf(file, NULL, _IOLBF, BUFSIZ);
    *functions[RANGE_START] = (function)start;
    *functions[RANGE_END] = (function)end;
    *functions[RANGE_PUSH] = *functions[RANGE_POP] = (function)stack;
    *functions[NAME_CATEGORY] = (function)name_category;
    *functions[REGISTER_STRING] = (function)register_string;
    *functions[CREATE_DOMAIN] = (function)create_domain;
    return 1;
}
