/* Preloaded into a test: writes down, in order and in memory, all that changes the files of one folder. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct entry {
    int64_t what, fd, at, path_bytes, data_bytes; /* then the path, then the data */
};

static char folder[4096];
static char *record;
static size_t used, room;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char ours[65536];

static void put(const void *bytes, size_t count) {
    while (used + count > room) record = realloc(record, room = 2 * room + (1 << 20));
    memcpy(record + used, bytes, count);
    used += count;
}

static void note(char what, int fd, int64_t at, const char *path, const void *data, size_t count) {
    struct entry entry = {what, fd, at, (int64_t)strlen(path), (int64_t)count};
    pthread_mutex_lock(&lock);
    put(&entry, sizeof entry);
    put(path, (size_t)entry.path_bytes);
    put(data, count);
    pthread_mutex_unlock(&lock);
}

void power_start(const char *path) {
    used = 0;
    memset(ours, 0, sizeof ours);
    strncpy(folder, path, sizeof folder - 1);
}

/* What has happened so far, in words of the test. */
void power_say(const char *text) { note('!', 0, 0, "", text, strlen(text)); }

const char *power_stop(int64_t *count) {
    folder[0] = 0;
    *count = (int64_t)used;
    return record;
}

static int touches(const char *path) {
    size_t length = strlen(folder);
    return length && path && strncmp(path, folder, length) == 0 && (path[length] == '/' || !path[length]);
}

static int is_ours(int fd) { return folder[0] && fd >= 0 && fd < (int)sizeof ours && ours[fd]; }

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        int fd = real(path, flags, mode); \
        if (fd < 0 || fd >= (int)sizeof ours) return fd; \
        ours[fd] = (char)touches(path); \
        if (ours[fd]) note('o', fd, flags & O_TRUNC ? 1 : 0, path + strlen(folder), "", 0); \
        return fd; \
    }
OPEN(open)
OPEN(open64)

int close(int fd) {
    REAL(close);
    if (fd >= 0 && fd < (int)sizeof ours) ours[fd] = 0;
    return real(fd);
}

ssize_t write(int fd, const void *bytes, size_t count) {
    REAL(write);
    ssize_t done = real(fd, bytes, count);
    if (done > 0 && is_ours(fd)) note('w', fd, lseek(fd, 0, SEEK_CUR) - done, "", bytes, (size_t)done);
    return done;
}

#define WRITE_AT(name) \
    ssize_t name(int fd, const void *bytes, size_t count, off_t offset) { \
        REAL(name); \
        ssize_t done = real(fd, bytes, count, offset); \
        if (done > 0 && is_ours(fd)) note('w', fd, offset, "", bytes, (size_t)done); \
        return done; \
    }
WRITE_AT(pwrite)
WRITE_AT(pwrite64)

#define ON_FILE(name, what, parameters, arguments, at) \
    int name parameters { \
        REAL(name); \
        int code = real arguments; \
        if (code == 0 && is_ours(fd)) note(what, fd, at, "", "", 0); \
        return code; \
    }
ON_FILE(fsync, 's', (int fd), (fd), 0)
ON_FILE(fdatasync, 's', (int fd), (fd), 0)
ON_FILE(ftruncate, 't', (int fd, off_t length), (fd, length), length)
ON_FILE(ftruncate64, 't', (int fd, off_t length), (fd, length), length)

#define ON_PATH(name, what, parameters, arguments, data, count) \
    int name parameters { \
        REAL(name); \
        int code = real arguments; \
        if (code == 0 && touches(path)) note(what, 0, 0, path + strlen(folder), data, count); \
        return code; \
    }
ON_PATH(rename, 'r', (const char *path, const char *to), (path, to), to + strlen(folder), strlen(to + strlen(folder)))
ON_PATH(unlink, 'u', (const char *path), (path), "", 0)
ON_PATH(mkdir, 'm', (const char *path, mode_t mode), (path, mode), "", 0)
