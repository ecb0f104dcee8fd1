/* Preloaded into a process, makes the N-th call that changes what is under a folder fail, or sends the process a signal there.

   faults_arm(folder, n, error, lasting): the n-th such call from now on fails with `error`, and so do those after
   it if `lasting` (a full disk stays full); a negative error is a signal to send instead.
   faults_disarm() ends that and returns the number of such calls since. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long nth, calls;
static int error_number, lasts;

void faults_arm(const char *under, long n, int error, int lasting) {
    snprintf(folder, sizeof folder, "%s/", under);
    nth = n, calls = 0, error_number = error, lasts = lasting;
}

long faults_disarm(void) {
    folder[0] = 0;
    return calls;
}

static int fails(const char *path) {
    if (!folder[0] || strncmp(path, folder, strlen(folder))) return 0;
    calls++;
    if (calls < nth || (calls > nth && !lasts)) return 0;
    if (error_number < 0) {
        kill(getpid(), -error_number);
        return 0;
    }
    errno = error_number;
    return 1;
}

static int fails_in(int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = folder[0] ? readlink(link, path, sizeof path - 1) : -1;
    if (length < 0) return 0;
    path[length] = 0;
    return fails(path);
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define ON_DESCRIPTOR(type, name, parameters, arguments) \
    type name parameters { REAL(name); return fails_in(fd) ? -1 : real arguments; }
#define ON_PATH(type, name, parameters, arguments) \
    type name parameters { REAL(name); return fails(path) ? -1 : real arguments; }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        REAL(name); return (flags & (O_CREAT | O_WRONLY | O_RDWR)) && fails(path) ? -1 : real(path, flags, mode); }

OPEN(open)
OPEN(open64)
ON_DESCRIPTOR(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
ON_DESCRIPTOR(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
ON_DESCRIPTOR(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
ON_DESCRIPTOR(ssize_t, sendfile, (int fd, int from, off_t *at, size_t size), (fd, from, at, size))
ON_DESCRIPTOR(ssize_t, sendfile64, (int fd, int from, off64_t *at, size_t size), (fd, from, at, size))
ON_DESCRIPTOR(int, ftruncate, (int fd, off_t size), (fd, size))
ON_DESCRIPTOR(int, ftruncate64, (int fd, off64_t size), (fd, size))
ON_DESCRIPTOR(int, fsync, (int fd), (fd))
ON_PATH(int, mkdir, (const char *path, mode_t mode), (path, mode))
ON_PATH(int, chmod, (const char *path, mode_t mode), (path, mode))
ON_PATH(int, rename, (const char *path, const char *to), (path, to))
