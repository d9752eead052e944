/* Memory: allocations, registered host memory, other processes' memory; and what tests ask and set. */
#define _GNU_SOURCE
#include "fake.h"
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAGIC 0x6563616368654163ULL

struct settings fake_settings = {1, 13000, 1, 0, 1, 0, (size_t)1 << 40, (size_t)1 << 40};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct region *regions;
static int lost, violations;
static char violation[200];
static __thread int current = -1;
static struct { char call[48]; int code, after; } faults[16];
static struct { char call[48]; int times; } calls[80];

/* --- calls, errors */

int fake_enter(const char *call)
{
    int code = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        if (!calls[i].call[0] || !strcmp(calls[i].call, call)) {
            snprintf(calls[i].call, sizeof calls[i].call, "%s", call);
            calls[i].times++;
            break;
        }
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        if (!strcmp(faults[i].call, call) && faults[i].after-- <= 0) {
            code = faults[i].code;
            faults[i].call[0] = 0;
            break;
        }
    pthread_mutex_unlock(&lock);
    return lost ? lost : code;
}

int fake_sticky(void) { return __atomic_load_n(&lost, __ATOMIC_ACQUIRE); }
void fake_lose(int code) { __atomic_store_n(&lost, code, __ATOMIC_RELEASE); }
int fake_current(void) { return current; }
void fake_use(int device) { current = device; }

void fake_violation(const char *text)
{
    pthread_mutex_lock(&lock);
    violations++;
    snprintf(violation, sizeof violation, "%s", text);
    pthread_mutex_unlock(&lock);
}

/* --- what tests call */

/* The named call fails with the code, once, after so many that go well. "async": the next thing a stream does. */
void fake_fail(const char *call, int code, int after)
{
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        if (!faults[i].call[0]) {
            snprintf(faults[i].call, sizeof faults[i].call, "%s", call);
            faults[i].code = code;
            faults[i].after = after;
            break;
        }
    pthread_mutex_unlock(&lock);
}

int fake_configure(const char *name, long long value)
{
    if (!strcmp(name, "devices")) fake_settings.devices = (int)value;
    else if (!strcmp(name, "driver_version")) fake_settings.driver_version = (int)value;
    else if (!strcmp(name, "read_only_supported")) fake_settings.read_only_supported = (int)value;
    else if (!strcmp(name, "delay_us")) fake_settings.delay_us = (int)value;
    else if (!strcmp(name, "seed")) fake_settings.seed = (int)value;
    else if (!strcmp(name, "any_memory")) fake_settings.any_memory = (int)value;
    else if (!strcmp(name, "device_bytes")) fake_settings.device_bytes = (size_t)value;
    else if (!strcmp(name, "register_bytes")) fake_settings.register_bytes = (size_t)value;
    else return -1;
    return 0;
}

/* As a fresh process, but for memory, streams and events that are still there. */
void fake_reset(void)
{
    fake_drain();
    pthread_mutex_lock(&lock);
    fake_settings = (struct settings){1, 13000, 1, 0, 1, 0, (size_t)1 << 40, (size_t)1 << 40};
    lost = violations = 0;
    memset(faults, 0, sizeof faults);
    memset(calls, 0, sizeof calls);
    pthread_mutex_unlock(&lock);
}

/* Everything that is there goes, as at a process's end. */
void fake_sweep(void)
{
    struct region gone;
    fake_drain();
    fake_stream_sweep();
    pthread_mutex_lock(&lock);
    while (regions) {
        struct region *first = regions;
        regions = first->next;
        gone = *first;
        free(first);
        if (gone.kind == DEVICE || gone.kind == HOST || gone.kind == OPENED) munmap((void *)gone.start, gone.size);
        if (gone.fd >= 0) close(gone.fd);
    }
    pthread_mutex_unlock(&lock);
}

int fake_calls(const char *call)
{
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        if (!strcmp(calls[i].call, call)) return calls[i].times;
    return 0;
}

const char *fake_violations(int *count)
{
    *count = violations;
    return violation;
}

/* What was made and not given back, by kind; places 0 and 6 are streams and events. */
void fake_live(int counts[KINDS + 1])
{
    memset(counts, 0, (KINDS + 1) * sizeof *counts);
    fake_stream_counts(&counts[0], &counts[KINDS]);
    pthread_mutex_lock(&lock);
    for (struct region *r = regions; r; r = r->next) counts[r->kind]++;
    pthread_mutex_unlock(&lock);
}

/* --- regions */

void fake_add(struct region region)
{
    struct region *made = malloc(sizeof *made);
    *made = region;
    pthread_mutex_lock(&lock);
    made->next = regions;
    regions = made;
    pthread_mutex_unlock(&lock);
}

bool fake_remove(uintptr_t start, int kind, struct region *removed)
{
    bool found = false;
    pthread_mutex_lock(&lock);
    for (struct region **at = &regions; *at; at = &(*at)->next)
        if ((*at)->start == start && (*at)->kind == kind) {
            struct region *gone = *at;
            *at = gone->next;
            *removed = *gone;
            free(gone);
            found = true;
            break;
        }
    pthread_mutex_unlock(&lock);
    return found;
}

bool fake_find(uintptr_t address, size_t size, struct region *found)
{
    bool there = false;
    pthread_mutex_lock(&lock);
    for (struct region *r = regions; r && !there; r = r->next)
        if (r->start <= address && address - r->start < r->size && size <= r->size - (address - r->start)) {
            *found = *r;
            there = true;
        }
    pthread_mutex_unlock(&lock);
    return there;
}

bool fake_may_touch(uintptr_t address, size_t size)
{
    struct region found;
    return !size || fake_settings.any_memory || (fake_find(address, size, &found) && (found.kind != MAPPED || found.readable));
}

static size_t used(int device)
{
    size_t sum = 0;
    pthread_mutex_lock(&lock);
    for (struct region *r = regions; r; r = r->next)
        if (r->kind == DEVICE && r->device == device) sum += r->size;
    pthread_mutex_unlock(&lock);
    return sum;
}

int fake_malloc(size_t size, int device, void **found)
{
    struct stat about;
    *found = NULL;
    if (!size) return 0;
    if (size > fake_settings.device_bytes || used(device) > fake_settings.device_bytes - size) return 2;
    int fd = memfd_create("fake-device", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)size) || fstat(fd, &about)) return 2;
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) {
        close(fd);
        return 2;
    }
    memset(memory, 0xDB, size < (16u << 20) ? size : (16u << 20)); /* fresh memory holds anything but zeros */
    fake_add((struct region){(uintptr_t)memory, size, DEVICE, device, fd, 1, true, about.st_ino, NULL});
    *found = memory;
    return 0;
}

int fake_host_alloc(size_t size, void **found)
{
    *found = NULL;
    if (!size) return 0;
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 2;
    memset(memory, 0xDB, size < (16u << 20) ? size : (16u << 20));
    fake_add((struct region){(uintptr_t)memory, size, HOST, -1, -1, 1, true, 0, NULL});
    *found = memory;
    return 0;
}

int fake_give_back(uintptr_t address, int kind)
{
    struct region gone;
    if (!address) return 0;
    if (!fake_find(address, 1, &gone) || gone.start != address || gone.kind != kind) return kind == REGISTERED ? 713 : 1;
    if (fake_in_use(gone.start, gone.size)) fake_violation("memory was given back with copies under way");
    fake_drain(); /* as CUDA: it waits for the device */
    if (!fake_remove(address, kind, &gone)) return 1;
    if (kind != REGISTERED) munmap((void *)gone.start, gone.size);
    if (gone.fd >= 0) close(gone.fd);
    return 0;
}

/* Whether every byte is mapped here, and may be written where it must. */
static bool is_mapped(uintptr_t address, size_t size, bool read_only)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512], rights[8];
    uintptr_t at = address, start, end;
    while (maps && at < address + size && fgets(line, sizeof line, maps))
        if (sscanf(line, "%lx-%lx %4s", &start, &end, rights) == 3 && start <= at && at < end) {
            if (rights[0] != 'r' || (rights[1] != 'w' && !read_only)) break;
            at = end;
        }
    if (maps) fclose(maps);
    return at >= address + size;
}

int fake_register(uintptr_t address, size_t size, bool read_only)
{
    bool overlaps = false;
    if (!address || !size || size > UINTPTR_MAX - address) return 1;
    if (read_only && !fake_settings.read_only_supported) return 801;
    pthread_mutex_lock(&lock);
    for (struct region *r = regions; r; r = r->next)
        overlaps |= address < r->start + r->size && r->start < address + size;
    pthread_mutex_unlock(&lock);
    if (overlaps) return 712;
    if (size > fake_settings.register_bytes) return 2;
    if (!is_mapped(address, size, read_only)) return 1;
    fake_add((struct region){address, size, REGISTERED, -1, -1, 1, true, 0, NULL});
    return 0;
}

/* --- other processes' memory: the handle says whose descriptor it is */

struct ipc { uint64_t magic; int32_t pid, fd; uint64_t size, inode; };

int fake_ipc_handle(uintptr_t address, unsigned char handle[64])
{
    struct region r;
    if (!fake_find(address, 1, &r) || r.kind != DEVICE) return 1;
    struct ipc ipc = {MAGIC, (int32_t)getpid(), r.fd, r.size, r.inode};
    memset(handle, 0, 64);
    memcpy(handle, &ipc, sizeof ipc);
    return 0;
}

int fake_ipc_open(const unsigned char handle[64], int device, void **found)
{
    struct ipc ipc;
    struct stat about;
    char path[64];
    memcpy(&ipc, handle, sizeof ipc);
    if (ipc.magic != MAGIC) return 400;
    if (ipc.pid == (int32_t)getpid()) return 201;
    pthread_mutex_lock(&lock);
    for (struct region *r = regions; r; r = r->next)
        if (r->kind == OPENED && r->inode == ipc.inode) { /* opened before: the same address, counted */
            r->refs++;
            *found = (void *)r->start;
            pthread_mutex_unlock(&lock);
            return 0;
        }
    pthread_mutex_unlock(&lock);
    snprintf(path, sizeof path, "/proc/%d/fd/%d", ipc.pid, ipc.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return 400;
    if (fstat(fd, &about) || about.st_ino != ipc.inode || (uint64_t)about.st_size != ipc.size) {
        close(fd);
        return 400;
    }
    void *memory = mmap(NULL, ipc.size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (memory == MAP_FAILED) return 205;
    fake_add((struct region){(uintptr_t)memory, ipc.size, OPENED, device, -1, 1, true, ipc.inode, NULL});
    *found = memory;
    return 0;
}

int fake_ipc_close(uintptr_t address)
{
    struct region gone;
    bool last = false;
    int code = 1;
    if (fake_find(address, 1, &gone) && fake_in_use(gone.start, gone.size))
        fake_violation("memory of another process was closed with copies under way");
    fake_drain();
    pthread_mutex_lock(&lock);
    for (struct region *r = regions; r; r = r->next)
        if (r->start == address && r->kind == OPENED) {
            last = !--r->refs;
            code = 0;
        }
    pthread_mutex_unlock(&lock);
    if (last && fake_remove(address, OPENED, &gone)) munmap((void *)gone.start, gone.size);
    return code;
}

const char *fake_text(int code)
{
    switch (code) {
    case 0: return "no error";
    case 1: return "invalid argument";
    case 2: return "out of memory";
    case 12: return "invalid pitch argument";
    case 21: return "invalid copy direction for memcpy";
    case 36: return "API call is not supported in the installed CUDA driver";
    case 101: return "invalid device ordinal";
    case 201: return "invalid device context";
    case 205: return "mapping of buffer object failed";
    case 400: return "invalid resource handle";
    case 600: return "device not ready";
    case 700: return "an illegal memory access was encountered";
    case 712: return "part or all of the requested memory range is already mapped";
    case 713: return "pointer does not correspond to a registered memory region";
    case 719: return "unspecified launch failure";
    case 800: return "operation not permitted";
    case 801: return "operation not supported";
    default: return "unknown error";
    }
}
