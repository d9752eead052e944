/* libcuda.so.1: what is called of the driver API. Needs a context: a call of the runtime on the same thread. */
#define _GNU_SOURCE
#include "fake.h"
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define GRANULARITY ((size_t)2 << 20)
#define TRY(call) do { int code_ = (call); if (code_) return code_; } while (0)

struct handle { int fd, refs; size_t size; uint64_t inode; };
struct location { int type, id; };
struct prop {
    int type, requested;
    struct location location;
    void *win32;
    unsigned char flags[8];
};
struct access_desc { struct location location; int flags; };

static bool initialised;
static struct handle handles[256]; /* a handle is its place here and one */
static struct { uintptr_t start; size_t size; } reserved[64];
static struct { uintptr_t start; int handle; } mapped[64];

static int enter(const char *call)
{
    TRY(fake_enter(call));
    return fake_current() < 0 ? 201 : 0;
}

int cuInit(unsigned flags)
{
    TRY(fake_enter("cuInit"));
    initialised = true;
    return flags ? 1 : 0;
}

int cuGetErrorString(int code, const char **text)
{
    *text = fake_text(code);
    return 0;
}

int cuDeviceGet(int *device, int ordinal)
{
    if (!initialised) return 3;
    TRY(fake_enter("cuDeviceGet"));
    *device = ordinal;
    return ordinal < 0 || ordinal >= fake_settings.devices ? 101 : 0;
}

int cuDeviceGetAttribute(int *found, int attribute, int device)
{
    TRY(fake_enter("cuDeviceGetAttribute"));
    *found = attribute == 122;
    return device < 0 || device >= fake_settings.devices ? 101 : 0;
}

int cuDeviceGetUuid_v2(unsigned char *uuid, int device)
{
    TRY(fake_enter("cuDeviceGetUuid_v2"));
    memcpy(uuid, "fake-device-uuid", 16);
    uuid[15] = (unsigned char)device;
    return device < 0 || device >= fake_settings.devices ? 101 : 0;
}

int cuDeviceGetName(char *name, int size, int device)
{
    TRY(fake_enter("cuDeviceGetName"));
    snprintf(name, (size_t)size, "fake device %d", device);
    return 0;
}

int cuMemGetAddressRange_v2(uint64_t *base, size_t *size, uint64_t address)
{
    struct region r;
    TRY(enter("cuMemGetAddressRange_v2"));
    if (!fake_find(address, 1, &r) || r.kind == REGISTERED) return 1;
    *base = r.start;
    *size = r.size;
    return 0;
}

/* --- memory of cuMemCreate */

static int made(int fd, uint64_t *handle)
{
    struct stat about;
    if (fd < 0 || fstat(fd, &about)) return 1;
    for (int i = 0; i < 256; i++)
        if (!handles[i].refs) {
            handles[i] = (struct handle){fd, 1, (size_t)about.st_size, about.st_ino};
            *handle = (uint64_t)i + 1;
            return 0;
        }
    return 2;
}

static struct handle *of(uint64_t handle)
{
    return handle && handle <= 256 && handles[handle - 1].refs ? &handles[handle - 1] : NULL;
}

int cuMemRelease(uint64_t handle)
{
    TRY(fake_enter("cuMemRelease"));
    struct handle *h = of(handle);
    if (!h) return 1;
    if (!--h->refs) close(h->fd);
    return 0;
}

static bool good(const struct prop *p)
{
    return p->type == 1 && p->location.type == 1 && p->location.id >= 0 && p->location.id < fake_settings.devices;
}

int cuMemGetAllocationGranularity(size_t *found, const struct prop *prop, int option)
{
    TRY(fake_enter("cuMemGetAllocationGranularity"));
    *found = GRANULARITY;
    return option < 0 || option > 1 || !good(prop) ? 1 : 0;
}

int cuMemCreate(uint64_t *handle, size_t size, const struct prop *prop, unsigned long long flags)
{
    TRY(enter("cuMemCreate"));
    if (flags || !size || size % GRANULARITY || !good(prop)) return 1;
    int fd = memfd_create("fake-vmm", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)size)) return 2;
    if (!(prop->requested & 1)) fcntl(fd, F_SETFD, 0); /* not exportable: said by a flag that nobody else uses */
    return made(fd, handle);
}

int cuMemRetainAllocationHandle(uint64_t *handle, void *address)
{
    struct region r;
    TRY(enter("cuMemRetainAllocationHandle"));
    if (!fake_find((uintptr_t)address, 1, &r) || r.kind != MAPPED) return 1;
    for (int i = 0; i < 64; i++)
        if (mapped[i].start == r.start) {
            handles[mapped[i].handle].refs++;
            *handle = (uint64_t)mapped[i].handle + 1;
            return 0;
        }
    return 1;
}

int cuMemExportToShareableHandle(int *fd, uint64_t handle, int type, unsigned long long flags)
{
    TRY(enter("cuMemExportToShareableHandle"));
    struct handle *h = of(handle);
    if (!h || type != 1 || flags) return 1;
    if (!(fcntl(h->fd, F_GETFD) & FD_CLOEXEC)) return 800;
    *fd = fcntl(h->fd, F_DUPFD_CLOEXEC, 3);
    return *fd < 0 ? 304 : 0;
}

int cuMemImportFromShareableHandle(uint64_t *handle, void *os_handle, int type)
{
    TRY(enter("cuMemImportFromShareableHandle"));
    if (type != 1) return 1;
    return made(fcntl((int)(intptr_t)os_handle, F_DUPFD_CLOEXEC, 3), handle);
}

int cuMemAddressReserve(uint64_t *address, size_t size, size_t alignment, uint64_t wanted, unsigned long long flags)
{
    TRY(enter("cuMemAddressReserve"));
    if (!size || size % GRANULARITY || wanted || flags || alignment) return 1;
    for (int i = 0; i < 64; i++)
        if (!reserved[i].start) {
            void *memory = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory == MAP_FAILED) return 2;
            reserved[i].start = (uintptr_t)memory;
            reserved[i].size = size;
            *address = (uint64_t)(uintptr_t)memory;
            return 0;
        }
    return 2;
}

int cuMemMap(uint64_t address, size_t size, size_t offset, uint64_t handle, unsigned long long flags)
{
    struct region r;
    TRY(enter("cuMemMap"));
    struct handle *h = of(handle);
    if (!h || offset || flags || !size || size % GRANULARITY || size > h->size) return 1;
    for (int i = 0; i < 64; i++) {
        if (address < reserved[i].start || address + size > reserved[i].start + reserved[i].size) continue;
        if (fake_find(address, 1, &r)) return 208;
        for (int j = 0; j < 64; j++)
            if (!mapped[j].start) {
                mapped[j].start = address;
                mapped[j].handle = (int)handle - 1;
                h->refs++;
                mmap((void *)address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, h->fd, 0);
                fake_add((struct region){address, size, MAPPED, 0, -1, 1, false, h->inode, NULL});
                return 0;
            }
    }
    return 1;
}

int cuMemSetAccess(uint64_t address, size_t size, const struct access_desc *desc, size_t count)
{
    struct region r;
    TRY(enter("cuMemSetAccess"));
    if (count != 1 || desc->location.type != 1 || desc->flags != 3) return 1;
    if (!fake_find(address, size, &r) || r.start != address || !fake_remove(address, MAPPED, &r)) return 1;
    r.readable = true;
    fake_add(r);
    return mprotect((void *)address, size, PROT_READ | PROT_WRITE) ? 1 : 0;
}

int cuMemUnmap(uint64_t address, size_t size)
{
    struct region r;
    TRY(enter("cuMemUnmap"));
    if (!fake_find(address, size, &r) || r.start != address || r.size != size || r.kind != MAPPED) return 1;
    if (fake_in_use(r.start, r.size)) fake_violation("memory was unmapped with copies under way");
    fake_drain();
    fake_remove(address, MAPPED, &r);
    mmap((void *)address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    for (int i = 0; i < 64; i++)
        if (mapped[i].start == address) {
            struct handle *h = &handles[mapped[i].handle];
            mapped[i].start = 0;
            if (!--h->refs) close(h->fd);
            break;
        }
    return 0;
}

int cuMemAddressFree(uint64_t address, size_t size)
{
    TRY(enter("cuMemAddressFree"));
    for (int i = 0; i < 64; i++)
        if (reserved[i].start == address && reserved[i].size == size) {
            munmap((void *)address, size);
            reserved[i].start = 0;
            return 0;
        }
    return 1;
}

/* Handles and reservations that are still there. */
int fake_vmm_live(void)
{
    int count = 0;
    for (int i = 0; i < 256; i++) count += handles[i].refs > 0;
    for (int i = 0; i < 64; i++) count += reserved[i].start != 0;
    return count;
}

/* --- counters */

int cuStreamWaitValue64_v2(struct stream *stream, uint64_t address, uint64_t value, unsigned flags)
{
    TRY(enter("cuStreamWaitValue64_v2"));
    return fake_value(stream, address, value, flags, false);
}

int cuStreamWriteValue64_v2(struct stream *stream, uint64_t address, uint64_t value, unsigned flags)
{
    TRY(enter("cuStreamWriteValue64_v2"));
    return fake_value(stream, address, value, flags, true);
}
