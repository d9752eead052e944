/* libcudart.so: what is called of the runtime API. VERSION (13000 or 12080, or 12040, which has no batches) is set
   when it is compiled. */
#include "fake.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef VERSION
#define VERSION 13000
#endif

struct location { int type, id; };
struct attributes { int order; struct location source, target; unsigned flags; };
struct handle { unsigned char reserved[64]; };
struct pointer { int type, device; void *device_pointer, *host_pointer; long reserved[8]; };

static __thread int last;

static int told(int code)
{
    if (code) last = code;
    return code;
}

/* Every call makes a device the thread's, as the first call of CUDA does, and may fail as a test has said. */
static int enter(const char *call)
{
    if (fake_current() < 0) fake_use(0);
    return fake_enter(call);
}

#define DO(name, expression) do { int code_ = enter(name); return told(code_ ? code_ : (expression)); } while (0)

int cudaGetLastError(void)
{
    int code = fake_sticky() ? fake_sticky() : last;
    last = 0;
    return code;
}

int cudaPeekAtLastError(void) { return fake_sticky() ? fake_sticky() : last; }
const char *cudaGetErrorString(int code) { return fake_text(code); }
const char *cudaGetErrorName(int code) { return fake_text(code); }

int cudaRuntimeGetVersion(int *version)
{
    *version = VERSION;
    return 0;
}

int cudaDriverGetVersion(int *version)
{
    *version = fake_settings.driver_version;
    return 0;
}

/* --- devices */

int cudaGetDeviceCount(int *count)
{
    int code = fake_enter("cudaGetDeviceCount");
    *count = fake_settings.devices;
    return told(code ? code : *count ? 0 : 100);
}

int cudaSetDevice(int device)
{
    int code = fake_enter("cudaSetDevice");
    if (!code && (device < 0 || device >= fake_settings.devices)) code = 101;
    if (!code) fake_use(device);
    return told(code);
}

int cudaGetDevice(int *device)
{
    *device = fake_current() < 0 ? 0 : fake_current();
    return 0;
}

int cudaDeviceGetAttribute(int *found, int attribute, int device)
{
    *found = attribute == 113 ? fake_settings.read_only_supported : 0;
    DO("cudaDeviceGetAttribute", device < 0 || device >= fake_settings.devices ? 101 : 0);
}

int cudaDeviceGetPCIBusId(char *found, int size, int device)
{
    DO("cudaDeviceGetPCIBusId", snprintf(found, (size_t)size, "FFFF:%02X:00.0", device) < 0);
}

int cudaDeviceSynchronize(void)
{
    fake_drain();
    DO("cudaDeviceSynchronize", 0);
}

int cudaPointerGetAttributes(struct pointer *found, const void *address)
{
    struct region r;
    bool there = fake_find((uintptr_t)address, 1, &r);
    bool host = there && (r.kind == HOST || r.kind == REGISTERED);
#if VERSION >= 13000
    memset(found->reserved, 0, sizeof found->reserved);
#endif
    found->type = !there ? 0 : host ? 1 : 2;
    found->device = there && !host ? r.device : fake_current();
    found->device_pointer = there ? (void *)address : NULL;
    found->host_pointer = host ? (void *)address : NULL;
    DO("cudaPointerGetAttributes", 0);
}

/* --- memory */

int cudaMalloc(void **found, size_t size) { DO("cudaMalloc", fake_malloc(size, fake_current(), found)); }
int cudaFree(void *address) { DO("cudaFree", fake_give_back((uintptr_t)address, DEVICE)); }
int cudaFreeHost(void *address) { DO("cudaFreeHost", fake_give_back((uintptr_t)address, HOST)); }

int cudaHostAlloc(void **found, size_t size, unsigned flags)
{
    DO("cudaHostAlloc", flags > 7 ? 1 : fake_host_alloc(size, found));
}

int cudaHostRegister(void *address, size_t size, unsigned flags)
{
    DO("cudaHostRegister", flags > 15 ? 1 : fake_register((uintptr_t)address, size, flags & 8));
}

int cudaHostUnregister(void *address)
{
    DO("cudaHostUnregister", address ? fake_give_back((uintptr_t)address, REGISTERED) : 1);
}

int cudaHostGetDevicePointer(void **found, void *address, unsigned flags)
{
    struct region r;
    *found = address;
    DO("cudaHostGetDevicePointer",
       flags || !fake_find((uintptr_t)address, 1, &r) || (r.kind != HOST && r.kind != REGISTERED) ? 1 : 0);
}

/* --- streams and events */

int cudaStreamCreateWithPriority(struct stream **found, unsigned flags, int priority)
{
    (void)priority; /* clamped to what there is */
    DO("cudaStreamCreateWithPriority", flags > 1 ? 1 : fake_stream(found));
}

int cudaStreamDestroy(struct stream *stream) { DO("cudaStreamDestroy", fake_stream_destroy(stream)); }
int cudaStreamSynchronize(struct stream *stream) { DO("cudaStreamSynchronize", fake_stream_wait(stream)); }
int cudaStreamQuery(struct stream *stream) { DO("cudaStreamQuery", fake_stream_query(stream)); }

int cudaStreamWaitEvent(struct stream *stream, struct event *event, unsigned flags)
{
    DO("cudaStreamWaitEvent", flags ? 1 : fake_stream_wait_event(stream, event));
}

int cudaLaunchHostFunc(struct stream *stream, void (*function)(void *), void *argument)
{
    DO("cudaLaunchHostFunc", function ? fake_call(stream, function, argument) : 1);
}

int cudaEventCreateWithFlags(struct event **found, unsigned flags)
{
    DO("cudaEventCreateWithFlags", flags > 7 ? 1 : fake_event(found));
}

int cudaEventDestroy(struct event *event) { DO("cudaEventDestroy", fake_event_destroy(event)); }

int cudaEventRecord(struct event *event, struct stream *stream)
{
    DO("cudaEventRecord", fake_event_record(event, stream));
}

int cudaEventQuery(struct event *event) { DO("cudaEventQuery", fake_event_query(event)); }
int cudaEventSynchronize(struct event *event) { DO("cudaEventSynchronize", fake_event_wait(event)); }

int cudaEventElapsedTime(float *ms, struct event *first, struct event *second)
{
    DO("cudaEventElapsedTime", fake_event_elapsed(first, second, ms));
}

/* --- copies */

static int copy(void *target, const void *source, size_t size, int kind, struct stream *stream)
{
    if (kind < 0 || kind > 4) return 21;
    if (!size) return 0;
    if (!target || !source) return 1;
    struct piece piece = {(uintptr_t)target, (uintptr_t)source, size};
    return fake_copy(stream, &piece, 1, false);
}

int cudaMemcpyAsync(void *target, const void *source, size_t size, int kind, struct stream *stream)
{
    DO("cudaMemcpyAsync", copy(target, source, size, kind, stream));
}

static int copy_strips(char *target, size_t target_pitch, const char *source, size_t source_pitch, size_t width,
                       size_t height, int kind, struct stream *stream)
{
    if (kind < 0 || kind > 4) return 21;
    if (target_pitch < width || source_pitch < width) return 12;
    if (!width || !height) return 0;
    struct piece *pieces = malloc(height * sizeof *pieces);
    for (size_t i = 0; i < height; i++)
        pieces[i] =
            (struct piece){(uintptr_t)target + i * target_pitch, (uintptr_t)source + i * source_pitch, width};
    int code = fake_copy(stream, pieces, height, false);
    free(pieces);
    return code;
}

int cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source, size_t source_pitch, size_t width,
                      size_t height, int kind, struct stream *stream)
{
    DO("cudaMemcpy2DAsync", copy_strips(target, target_pitch, source, source_pitch, width, height, kind, stream));
}

int cudaMemsetAsync(void *address, int value, size_t size, struct stream *stream)
{
    DO("cudaMemsetAsync", !size ? 0 : !address ? 1 : fake_fill(stream, (uintptr_t)address, value, size));
}

#if VERSION >= 12080
static int batch(void *const *targets, const void *const *sources, const size_t *sizes, size_t count,
                 struct attributes *attributes, size_t *firsts, size_t kinds, size_t *failed, struct stream *stream)
{
    if (failed) *failed = SIZE_MAX;
    if (fake_settings.driver_version < 12080) return 36;
    if (!targets || !sources || !sizes || !attributes || !firsts || !stream) return 1;
    if (!count || !kinds || kinds > count || firsts[0]) return 1;
    for (size_t i = 0; i < kinds; i++)
        if (attributes[i].order < 1 || attributes[i].order > 3 || attributes[i].flags > 1) return 1;
    struct piece *pieces = malloc(count * sizeof *pieces);
    int code = 0;
    for (size_t i = 0; i < count && !code; i++) {
        pieces[i] = (struct piece){(uintptr_t)targets[i], (uintptr_t)sources[i], sizes[i]};
        if (!targets[i] || !sources[i] || !sizes[i]) {
            code = 1;
            if (failed) *failed = i;
        }
    }
    code = code ? code : fake_copy(stream, pieces, count, true);
    free(pieces);
    return code;
}
#endif
#if VERSION >= 13000
int cudaMemcpyBatchAsync(void *const *targets, const void *const *sources, const size_t *sizes, size_t count,
                         struct attributes *attributes, size_t *firsts, size_t kinds, struct stream *stream)
{
    DO("cudaMemcpyBatchAsync", batch(targets, sources, sizes, count, attributes, firsts, kinds, NULL, stream));
}
#elif VERSION >= 12080
int cudaMemcpyBatchAsync(void **targets, void **sources, size_t *sizes, size_t count, struct attributes *attributes,
                         size_t *firsts, size_t kinds, size_t *failed, struct stream *stream)
{
    DO("cudaMemcpyBatchAsync",
       !failed ? 1
               : batch((void *const *)targets, (const void *const *)sources, sizes, count, attributes, firsts, kinds,
                       failed, stream));
}
#endif

/* --- other processes' memory */

int cudaIpcGetMemHandle(struct handle *handle, void *address)
{
    DO("cudaIpcGetMemHandle", fake_ipc_handle((uintptr_t)address, handle->reserved));
}

int cudaIpcOpenMemHandle(void **found, struct handle handle, unsigned flags)
{
    DO("cudaIpcOpenMemHandle", flags != 1 ? 1 : fake_ipc_open(handle.reserved, fake_current(), found));
}

int cudaIpcCloseMemHandle(void *address) { DO("cudaIpcCloseMemHandle", fake_ipc_close((uintptr_t)address)); }
