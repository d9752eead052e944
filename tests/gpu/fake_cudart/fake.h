/* A CUDA driver and runtime in ordinary memory: what the two libraries share. All of it lives in libcuda.so.1.

   Device memory is a memfd of its own per allocation, so that other processes can map it; addresses are plain
   addresses. Streams are threads. Where CUDA would read or write memory that it does not know, the fake says
   error 700 and, as CUDA, says it again to every call from then on. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { DEVICE = 1, HOST = 2, REGISTERED = 3, OPENED = 4, MAPPED = 5, KINDS = 6 };

struct region {
    uintptr_t start;
    size_t size;
    int kind, device, fd, refs;
    bool readable; /* MAPPED: access was set */
    uint64_t inode;
    struct region *next;
};

struct piece {
    uintptr_t target, source; /* target 0: nothing is written; source 0: nothing is read */
    size_t size;
};

/* configuration: see ``fake_configure`` */
struct settings {
    int devices, driver_version, read_only_supported, delay_us, seed;
    int any_memory; /* memory that nobody has made known counts as known */
    size_t device_bytes, register_bytes;
};
extern struct settings fake_settings;

/* calls: every exported CUDA function begins with ``fake_enter`` and returns what it says where that is not 0 */
int fake_enter(const char *call);
int fake_sticky(void);
void fake_lose(int code);
void fake_violation(const char *text);

/* the thread's device: -1 before its first call of the runtime */
int fake_current(void);
void fake_use(int device);

/* memory.c */
int fake_malloc(size_t size, int device, void **found);
int fake_host_alloc(size_t size, void **found);
int fake_give_back(uintptr_t address, int kind);
int fake_register(uintptr_t address, size_t size, bool read_only);
int fake_ipc_handle(uintptr_t address, unsigned char handle[64]);
int fake_ipc_open(const unsigned char handle[64], int device, void **found);
int fake_ipc_close(uintptr_t address);
/* a copy of the region that holds all these bytes; false where there is none */
bool fake_find(uintptr_t address, size_t size, struct region *found);
void fake_add(struct region region);
bool fake_remove(uintptr_t start, int kind, struct region *removed);
bool fake_may_touch(uintptr_t address, size_t size);

/* streams.c */
struct stream;
struct event;
int fake_stream(struct stream **found);
int fake_stream_destroy(struct stream *stream);
int fake_stream_wait(struct stream *stream);
int fake_stream_query(struct stream *stream);
void fake_drain(void);
void fake_stream_sweep(void);
bool fake_in_use(uintptr_t start, size_t size);
int fake_copy(struct stream *stream, const struct piece *pieces, size_t count, bool any_order);
int fake_fill(struct stream *stream, uintptr_t address, int value, size_t size);
int fake_call(struct stream *stream, void (*function)(void *), void *argument);
int fake_value(struct stream *stream, uintptr_t address, uint64_t value, unsigned flags, bool write);
int fake_event(struct event **found);
int fake_event_destroy(struct event *event);
int fake_event_record(struct event *event, struct stream *stream);
int fake_event_query(struct event *event);
int fake_event_wait(struct event *event);
int fake_event_elapsed(struct event *first, struct event *second, float *ms);
int fake_stream_wait_event(struct stream *stream, struct event *event);
void fake_stream_counts(int *streams, int *events);
const char *fake_text(int code);
