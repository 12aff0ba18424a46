/* Preloaded into a test process: at the N-th call that changes something below one folder, send the
 * process a signal or let the call fail. Build: cc -shared -fPIC -o faults.so faults.c -ldl
 *
 * arm(folder, N, how, number, page)
 *   how 0   the signal `number`, before the call is made; SIGKILL and SIGSTOP are the useful ones
 *   how 1   that one call fails with the errno `number`
 *   how 2   it and all later calls that need space (create, write, mkdir) fail with it
 *   page    memory shared with the parent: the count, then a line a call, so that the parent reads
 *           them also when the process was killed
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long at = 0;
static int how = 0, number = 0;

static struct page {
    long count, struck, used;
    char lines[1 << 20];
} *page;

void arm(const char *below, long nth, int kind, int code, struct page *shared) {
    snprintf(folder, sizeof folder, "%s", below);
    at = nth, how = kind, number = code, page = shared;
}

static int fails(const char *call, const char *path, int needs_space) {
    if (!at || !path || strncmp(path, folder, strlen(folder))) return 0;
    if (how == 2 && !needs_space) return 0;
    long count = __sync_add_and_fetch(&page->count, 1);
    long room = (long)sizeof page->lines - page->used;
    int length = snprintf(page->lines + page->used, room, "%s %s\n", call, path + strlen(folder));
    if (length < room) page->used += length;
    int hit = how == 2 ? count >= at : count == at;
    if (!hit) return 0;
    if (!page->struck) page->struck = count;
    if (how == 0) {
        kill(getpid(), number);
        return 0;
    }
    errno = number;
    return 1;
}

static const char *path_of(int handle, char *room) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, room, PATH_MAX - 1);
    room[length < 0 ? 0 : length] = 0;
    return room;
}
static const char *path_at(int base, const char *name, char *room) {
    if (name[0] == '/' || base == AT_FDCWD) return name;
    path_of(base, room);
    strncat(room, "/", PATH_MAX - strlen(room) - 1);
    strncat(room, name, PATH_MAX - strlen(room) - 1);
    return room;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define MODE(flags) mode_t mode = 0; if ((flags) & O_CREAT) { \
    va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }
#define OPEN(name) int name(const char *path, int flags, ...) { REAL(name); MODE(flags) \
    if ((flags & O_CREAT) && fails("create", path, 1)) return -1; return real(path, flags, mode); }
#define OPENAT(name) int name(int base, const char *path, int flags, ...) { REAL(name); MODE(flags) \
    char room[PATH_MAX]; \
    if ((flags & O_CREAT) && fails("create", path_at(base, path, room), 1)) return -1; \
    return real(base, path, flags, mode); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

ssize_t write(int handle, const void *data, size_t length) {
    REAL(write);
    char room[PATH_MAX];
    if (at && fails("write", path_of(handle, room), 1)) return -1;
    return real(handle, data, length);
}
ssize_t pwrite(int handle, const void *data, size_t length, off_t offset) {
    REAL(pwrite);
    char room[PATH_MAX];
    if (at && fails("pwrite", path_of(handle, room), 1)) return -1;
    return real(handle, data, length, offset);
}
int ftruncate(int handle, off_t length) {
    REAL(ftruncate);
    char room[PATH_MAX];
    if (at && fails("ftruncate", path_of(handle, room), 1)) return -1;
    return real(handle, length);
}
int fsync(int handle) {
    REAL(fsync);
    char room[PATH_MAX];
    if (at && fails("fsync", path_of(handle, room), 0)) return -1;
    return real(handle);
}
int close(int handle) {
    REAL(close);
    char room[PATH_MAX];
    int bad = at && (fcntl(handle, F_GETFL) & O_ACCMODE) != O_RDONLY &&
              fails("close", path_of(handle, room), 0);
    int code = errno, done = real(handle);
    if (bad) errno = code;
    return bad ? -1 : done;
}
int truncate(const char *path, off_t length) {
    REAL(truncate);
    return fails("truncate", path, 0) ? -1 : real(path, length);
}
int rename(const char *from, const char *to) {
    REAL(rename);
    return fails("rename", to, 0) ? -1 : real(from, to);
}
int unlink(const char *path) { REAL(unlink); return fails("unlink", path, 0) ? -1 : real(path); }
int rmdir(const char *path) { REAL(rmdir); return fails("rmdir", path, 0) ? -1 : real(path); }
int unlinkat(int base, const char *path, int flags) {
    REAL(unlinkat);
    char room[PATH_MAX];
    const char *call = flags & AT_REMOVEDIR ? "rmdir" : "unlink";
    return fails(call, path_at(base, path, room), 0) ? -1 : real(base, path, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return fails("mkdir", path, 1) ? -1 : real(path, mode);
}
int chmod(const char *path, mode_t mode) {
    REAL(chmod);
    return fails("chmod", path, 0) ? -1 : real(path, mode);
}
