/* Preloaded into a test: the k-th call that touches a folder fails, or all from the k-th on, or gets half its bytes. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

enum { ONCE, FROM_THERE, SHORT };

static char folder[4096];
static _Atomic long calls, chosen;
static int error_number, way;
static _Atomic char ours[65536];

/* k from 1; 0: nothing fails, calls are counted. */
void faults_arm(const char *path, long k, int number, int how) {
    strncpy(folder, path, sizeof folder - 1);
    error_number = number;
    way = how;
    calls = 0;
    chosen = k;
}

long faults_disarm(void) {
    folder[0] = 0;
    return calls;
}

static int fails(void) {
    long call = ++calls;
    if (chosen == 0 || !(call == chosen || (way == FROM_THERE && call > chosen))) return 0;
    if (way == SHORT) return 2;
    errno = error_number;
    return 1;
}

static int touches(const char *path) { return folder[0] && path && strncmp(path, folder, strlen(folder)) == 0; }

static int is_ours(int fd) { return folder[0] && fd >= 0 && fd < (int)sizeof ours && ours[fd]; }

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define OPEN(name, before, at, ...) \
    int name(before const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        int mine = touches(path); \
        if (mine && fails() == 1) return -1; \
        int fd = real(at path, flags, mode); \
        if (fd >= 0 && fd < (int)sizeof ours) ours[fd] = (char)mine; \
        return fd; \
    }
OPEN(open, , )
OPEN(open64, , )
#define FOLDER int from,
#define FROM from,
OPEN(openat, FOLDER, FROM)
OPEN(openat64, FOLDER, FROM)

int close(int fd) {
    REAL(close);
    if (fd >= 0 && fd < (int)sizeof ours) ours[fd] = 0;
    return real(fd);
}

#define BYTES(name, buffer, after, rest) \
    ssize_t name(int fd, buffer bytes, size_t count after) { \
        REAL(name); \
        int wrong = is_ours(fd) ? fails() : 0; \
        return wrong == 1 ? -1 : real(fd, bytes, wrong && count > 1 ? count / 2 : count rest); \
    }
#define AT , off_t offset
#define OFFSET , offset
BYTES(read, void *, , )
BYTES(write, const void *, , )
BYTES(pread, void *, AT, OFFSET)
BYTES(pread64, void *, AT, OFFSET)
BYTES(pwrite, const void *, AT, OFFSET)
BYTES(pwrite64, const void *, AT, OFFSET)

/* Half: the first of many pieces of memory, or half of the only one. */
#define PIECES(name, after, rest) \
    ssize_t name(int fd, const struct iovec *pieces, int count, off_t offset after) { \
        REAL(name); \
        int wrong = is_ours(fd) ? fails() : 0; \
        if (wrong == 1) return -1; \
        struct iovec half = pieces[0]; \
        half.iov_len = half.iov_len > 1 ? half.iov_len / 2 : half.iov_len; \
        return wrong ? real(fd, &half, 1, offset rest) : real(fd, pieces, count, offset rest); \
    }
#define FLAGS , int flags
#define GIVEN , flags
PIECES(preadv, , )
PIECES(preadv64, , )
PIECES(preadv2, FLAGS, GIVEN)
PIECES(preadv64v2, FLAGS, GIVEN)

#define ON_FILE(name, parameters, arguments) \
    int name parameters { \
        REAL(name); \
        return is_ours(fd) && fails() == 1 ? -1 : real arguments; \
    }
ON_FILE(fsync, (int fd), (fd))
ON_FILE(fdatasync, (int fd), (fd))
ON_FILE(flock, (int fd, int how), (fd, how))
ON_FILE(ftruncate, (int fd, off_t length), (fd, length))
ON_FILE(ftruncate64, (int fd, off_t length), (fd, length))
ON_FILE(fstat, (int fd, struct stat *found), (fd, found))
ON_FILE(fstat64, (int fd, struct stat64 *found), (fd, found))

#define ON_PATH(name, parameters, arguments) \
    int name parameters { \
        REAL(name); \
        return touches(path) && fails() == 1 ? -1 : real arguments; \
    }
ON_PATH(rename, (const char *path, const char *to), (path, to))
ON_PATH(unlink, (const char *path), (path))
ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode))
ON_PATH(chmod, (const char *path, mode_t mode), (path, mode))
ON_PATH(stat, (const char *path, struct stat *found), (path, found))
ON_PATH(stat64, (const char *path, struct stat64 *found), (path, found))
ON_PATH(lstat, (const char *path, struct stat *found), (path, found))
ON_PATH(lstat64, (const char *path, struct stat64 *found), (path, found))
ON_PATH(statvfs, (const char *path, struct statvfs *found), (path, found))
ON_PATH(statvfs64, (const char *path, struct statvfs64 *found), (path, found))

#define MAP(name) \
    void *name(void *at, size_t length, int access, int flags, int fd, off_t offset) { \
        REAL(name); \
        return is_ours(fd) && fails() == 1 ? MAP_FAILED : real(at, length, access, flags, fd, offset); \
    }
MAP(mmap)
MAP(mmap64)

DIR *opendir(const char *path) {
    REAL(opendir);
    return touches(path) && fails() == 1 ? NULL : real(path);
}
