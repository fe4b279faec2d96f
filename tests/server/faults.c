/* Preloaded into a server: the k-th call of one process on its files, sockets and pipes fails, or all from the k-th on,
   or gets half its bytes. Which and how stands in CONTROL, a file that the test has mapped too. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ONCE, FROM_THERE, SHORT };

/* A process id of 0 arms nobody; k counts from 1, and with 0 nothing fails. */
static struct control {
    _Atomic int32_t pid;
    int32_t error_number, way, unused;
    int64_t chosen;
    _Atomic int64_t calls;
} *control;

__attribute__((constructor)) static void open_control(void) {
    int fd = open(CONTROL, O_RDWR | O_CLOEXEC);
    void *at = fd < 0 ? MAP_FAILED : mmap(0, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd >= 0) close(fd);
    if (at != MAP_FAILED) control = at;
}

static int fails(void) {
    if (!control || control->pid != getpid()) return 0;
    long call = ++control->calls;
    if (control->chosen == 0 || !(call == control->chosen || (control->way == FROM_THERE && call > control->chosen)))
        return 0;
    if (control->way == SHORT) return 2;
    errno = control->error_number;
    return 1;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define OPEN(name, before, at) \
    int name(before const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        return fails() == 1 ? -1 : real(at path, flags, mode); \
    }
OPEN(open, , )
OPEN(open64, , )
#define FOLDER int from,
#define FROM from,
OPEN(openat, FOLDER, FROM)
OPEN(openat64, FOLDER, FROM)

#define BYTES(name, buffer, after, rest) \
    ssize_t name(int fd, buffer bytes, size_t count after) { \
        REAL(name); \
        int wrong = fails(); \
        return wrong == 1 ? -1 : real(fd, bytes, wrong && count > 1 ? count / 2 : count rest); \
    }
BYTES(read, void *, , )
BYTES(write, const void *, , )
#define FLAGS , int flags
#define GIVEN , flags
BYTES(recv, void *, FLAGS, GIVEN)
BYTES(send, const void *, FLAGS, GIVEN)

#define CALL(name, parameters, arguments) \
    int name parameters { \
        REAL(name); \
        return fails() == 1 ? -1 : real arguments; \
    }
CALL(accept4, (int fd, struct sockaddr *from, socklen_t *bytes, int flags), (fd, from, bytes, flags))
CALL(socketpair, (int family, int kind, int protocol, int pair[2]), (family, kind, protocol, pair))
CALL(pipe2, (int pair[2], int flags), (pair, flags))
