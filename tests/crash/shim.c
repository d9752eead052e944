/* Preloaded into a process under test: stands between it and the files below one folder.
 *
 * Records what would reach the medium and when, so that the state after a power cut can be built, and fails or delays
 * writes on command. It changes nothing for files elsewhere.
 *
 *   SHIM_ROOT     the folder
 *   SHIM_LOG      where to record; absent: nowhere
 *   SHIM_CONTROL  a file of 32 bytes: what to do now. i32 fault, i32 argument, i32 left: faults come when it is 0 and
 *                 it counts down by one an operation while positive; SIGKILL ("cut") likewise
 *
 * A record: u32 kind, u32 length of what follows the head, u64 inode, u64 offset (or size), then name or data.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { WRITE = 1, TRUNCATE, SYNC, CREATE, MKDIR, RENAME, UNLINK, RMDIR };
enum { FINE = 0, NO_SPACE, IO_WRITE, IO_SYNC, READ_ONLY, SLOW, CUT };
enum { TO_WRITE, TO_SYNC, TO_NAME };

static char root[4096];
static size_t root_length;
static int log_fd = -1;
static volatile int32_t *control;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int inside;

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

__attribute__((constructor)) static void start(void) {
    const char *where = getenv("SHIM_ROOT"), *log = getenv("SHIM_LOG"), *how = getenv("SHIM_CONTROL");
    if (!where || !realpath(where, root)) return;
    root_length = strlen(root);
    if (log && *log) log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    int fd = how ? syscall(SYS_openat, AT_FDCWD, how, O_RDWR | O_CLOEXEC) : -1;
    if (fd >= 0) {
        control = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (control == MAP_FAILED) control = NULL;
        syscall(SYS_close, fd);
    }
}

static int below(const char *path) {
    return root_length && !strncmp(path, root, root_length) && (!path[root_length] || path[root_length] == '/');
}

/* Where an open file lies; 0 when that is not below the root. */
static int place(int fd, char *path) {
    char link[64];
    if (!root_length || fd < 0 || fd == log_fd) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, path, 4095);
    if (n <= 0) return 0;
    path[n] = 0;
    return below(path);
}

/* The absolute name of a file that may not exist; 0 when it is not below the root. */
static int name_of(int dir, const char *name, char *path) {
    char parent[4096];
    if (!root_length) return 0;
    if (name[0] == '/') snprintf(parent, sizeof parent, "%s", name);
    else {
        if (dir == AT_FDCWD) { if (!getcwd(parent, sizeof parent)) return 0; }
        else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
            ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, parent, 4095);
            if (n <= 0) return 0;
            parent[n] = 0;
        }
        size_t at = strlen(parent);
        snprintf(parent + at, sizeof parent - at, "/%s", name);
    }
    snprintf(path, 4096, "%s", parent);
    return below(path);
}

/* What the control file wants of this operation: 0, or -1 with errno set. */
static int trouble(int step) {
    if (!control) return 0;
    int32_t fault = control[0];
    if (fault == FINE) return 0;
    if (fault == SLOW) {
        if (step == TO_NAME) return 0;
        struct timespec rest = {control[1] / 1000, (control[1] % 1000) * 1000000L};
        nanosleep(&rest, NULL);
        return 0;
    }
    if (fault == CUT) {
        if (__sync_fetch_and_sub(&control[2], 1) <= 0) syscall(SYS_kill, getpid(), SIGKILL);
        return 0;
    }
    if (control[2] > 0) { __sync_fetch_and_sub(&control[2], 1); return 0; }
    if (fault == IO_SYNC ? step != TO_SYNC : step == TO_SYNC && fault != IO_WRITE) return 0;
    if (fault == IO_WRITE && step == TO_NAME) return 0;
    errno = fault == NO_SPACE ? ENOSPC : fault == READ_ONLY ? EROFS : EIO;
    return -1;
}

static void record(uint32_t kind, uint64_t inode, uint64_t offset, const struct iovec *parts, int count) {
    if (log_fd < 0) return;
    uint32_t head[6] = {kind, 0};
    memcpy(head + 2, &inode, 8);
    memcpy(head + 4, &offset, 8);
    struct iovec all[1040];
    all[0].iov_base = head;
    all[0].iov_len = sizeof head;
    for (int i = 0; i < count && i < 1039; i++) { all[i + 1] = parts[i]; head[1] += parts[i].iov_len; }
    syscall(SYS_writev, log_fd, all, count + 1);
}

static void record_name(uint32_t kind, uint64_t inode, const char *from, const char *to) {
    struct iovec parts[2] = {{(void *)from, strlen(from) + 1}, {(void *)to, to ? strlen(to) + 1 : 0}};
    record(kind, inode, 0, parts, to ? 2 : 1);
}

static uint64_t inode_of(int fd) {
    struct stat seen;
    return fstat(fd, &seen) ? 0 : seen.st_ino;
}

/* ---- writing */

static ssize_t note(int fd, ssize_t done, uint64_t offset, const struct iovec *parts, int count) {
    if (done <= 0 || log_fd < 0) return done;
    struct iovec cut[1024];
    size_t left = done;
    int used = 0;
    for (int i = 0; i < count && left && i < 1024; i++, used++) {
        cut[i] = parts[i];
        if (cut[i].iov_len > left) cut[i].iov_len = left;
        left -= cut[i].iov_len;
    }
    record(WRITE, inode_of(fd), offset, cut, used);
    int flags = fcntl(fd, F_GETFL);
    /* Bit 63: this write alone is on the medium when it returns. */
    if (flags >= 0 && (flags & O_DSYNC)) record(SYNC, inode_of(fd), (1ULL << 63) | offset, cut, used);
    return done;
}

#define WRITES(call, offset, parts, count) do { \
    char path[4096]; \
    int saved = errno; \
    if (inside || !place(fd, path)) { errno = saved; return call; } \
    if (trouble(TO_WRITE)) return -1; \
    inside = 1; \
    pthread_mutex_lock(&lock); \
    ssize_t done = call; \
    saved = errno; \
    note(fd, done, offset, parts, count); \
    pthread_mutex_unlock(&lock); \
    inside = 0; \
    errno = saved; \
    return done; \
} while (0)

static uint64_t position(int fd, ssize_t) ;
static uint64_t position(int fd, ssize_t unused) {
    (void)unused;
    int flags = fcntl(fd, F_GETFL);
    struct stat seen;
    if (flags >= 0 && (flags & O_APPEND)) return fstat(fd, &seen) ? 0 : (uint64_t)seen.st_size;
    return (uint64_t)lseek(fd, 0, SEEK_CUR);
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    struct iovec one = {(void *)data, size};
    uint64_t at = inside ? 0 : position(fd, 0);
    WRITES(real(fd, data, size), at, &one, 1);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    uint64_t at = inside ? 0 : position(fd, 0);
    WRITES(real(fd, parts, count), at, parts, count);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(pwrite);
    struct iovec one = {(void *)data, size};
    WRITES(real(fd, data, size, at), (uint64_t)at, &one, 1);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    struct iovec one = {(void *)data, size};
    WRITES(real(fd, data, size, at), (uint64_t)at, &one, 1);
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
    REAL(pwritev);
    WRITES(real(fd, parts, count, at), (uint64_t)at, parts, count);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t at) {
    REAL(pwritev64);
    WRITES(real(fd, parts, count, at), (uint64_t)at, parts, count);
}

#define STEP(step, call, told) do { \
    if (trouble(step)) return -1; \
    pthread_mutex_lock(&lock); \
    int done = call; \
    int saved = errno; \
    if (!done) { told; } \
    pthread_mutex_unlock(&lock); \
    errno = saved; \
    return done; \
} while (0)

int ftruncate(int fd, off_t size) {
    REAL(ftruncate);
    char path[4096];
    if (!place(fd, path)) return real(fd, size);
    STEP(TO_WRITE, real(fd, size), record(TRUNCATE, inode_of(fd), size, NULL, 0));
}
int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64);
    char path[4096];
    if (!place(fd, path)) return real(fd, size);
    STEP(TO_WRITE, real(fd, size), record(TRUNCATE, inode_of(fd), size, NULL, 0));
}

/* ---- syncing */

int fsync(int fd) {
    REAL(fsync);
    char path[4096];
    if (!place(fd, path)) return real(fd);
    STEP(TO_SYNC, 0, record_name(SYNC, inode_of(fd), path, NULL));
}
int fdatasync(int fd) {
    REAL(fdatasync);
    char path[4096];
    if (!place(fd, path)) return real(fd);
    STEP(TO_SYNC, 0, record_name(SYNC, inode_of(fd), path, NULL));
}

/* ---- names */

static int opened(int fd, int flags) {
    char path[4096];
    if (fd >= 0 && (flags & (O_CREAT | O_TRUNC)) && place(fd, path)) {
        pthread_mutex_lock(&lock);
        if (flags & O_CREAT) record_name(CREATE, inode_of(fd), path, NULL);
        if (flags & O_TRUNC) record(TRUNCATE, inode_of(fd), 0, NULL, 0);
        pthread_mutex_unlock(&lock);
    }
    return fd;
}

static int may_open(int dir, const char *name, int flags) {
    char path[4096];
    if (!(flags & (O_CREAT | O_WRONLY | O_RDWR)) || !name_of(dir, name, path)) return 1;
    /* A file system that is full or broken still opens what is there. */
    if (control && control[0] != READ_ONLY && !((flags & O_CREAT) && access(path, F_OK))) return 1;
    return !trouble(TO_NAME);
}

#define OPENS(dir, call) do { \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    if (!may_open(dir, name, flags)) return -1; \
    return opened(call, flags); \
} while (0)

int open(const char *name, int flags, ...) { REAL(open); OPENS(AT_FDCWD, real(name, flags, mode)); }
int open64(const char *name, int flags, ...) { REAL(open64); OPENS(AT_FDCWD, real(name, flags, mode)); }
int openat(int dir, const char *name, int flags, ...) { REAL(openat); OPENS(dir, real(dir, name, flags, mode)); }
int openat64(int dir, const char *name, int flags, ...) { REAL(openat64); OPENS(dir, real(dir, name, flags, mode)); }

int mkdirat(int dir, const char *name, mode_t mode) {
    REAL(mkdirat);
    char path[4096];
    if (!name_of(dir, name, path)) return real(dir, name, mode);
    STEP(TO_NAME, real(dir, name, mode), record_name(MKDIR, 0, path, NULL));
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    REAL(renameat);
    char a[4096], b[4096];
    if (!name_of(from_dir, from, a) || !name_of(to_dir, to, b)) return real(from_dir, from, to_dir, to);
    STEP(TO_NAME, real(from_dir, from, to_dir, to), record_name(RENAME, 0, a, b));
}
int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }

int unlinkat(int dir, const char *name, int flags) {
    REAL(unlinkat);
    char path[4096];
    if (!name_of(dir, name, path)) return real(dir, name, flags);
    STEP(TO_NAME, real(dir, name, flags), record_name(flags & AT_REMOVEDIR ? RMDIR : UNLINK, 0, path, NULL));
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
