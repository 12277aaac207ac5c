/* Loaded into the program before the C library: counts the system calls that change a folder or open a file in it, and at the one that is asked
 * for kills the program or lets the call fail.
 *
 * BREAK_UNDER  folder, as an absolute path
 * BREAK_LOG    file that a line for each call is added to: its name and the path below the folder
 * BREAK_LINE   line of the call that is broken
 * BREAK_AT     number of the call among those with this line, from 1
 * BREAK_HOW    "kill" or "fail"
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *under, *wanted, *how, *log_path;
static long at, count;

__attribute__((constructor)) static void begin(void) {
    under = getenv("BREAK_UNDER");
    wanted = getenv("BREAK_LINE");
    how = getenv("BREAK_HOW");
    log_path = getenv("BREAK_LOG");
    at = getenv("BREAK_AT") ? atol(getenv("BREAK_AT")) : 0;
}

/* True if the call has to fail. */
static int breaks(const char *call, const char *path, int code) {
    if (!under || strncmp(path, under, strlen(under)) != 0) return 0;
    char line[PATH_MAX + 64];
    snprintf(line, sizeof line, "%s %s", call, path + strlen(under));
    /* Temporary files have random names. */
    char *temporary = strstr(line, "/.tmp");
    if (temporary) temporary[5] = 0;
    if (log_path) {
        long log = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND, 0600);
        if (log >= 0) {
            syscall(SYS_write, log, line, strlen(line));
            syscall(SYS_write, log, "\n", 1);
            syscall(SYS_close, log);
        }
    }
    if (!wanted || strcmp(line, wanted) != 0) return 0;
    if (__atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST) != at) return 0;
    if (strcmp(how, "kill") == 0) {
        syscall(SYS_kill, getpid(), SIGKILL);
        for (;;) pause();
    }
    errno = code;
    return 1;
}

/* The path behind a descriptor, with a name below it. */
static const char *of(int descriptor, const char *name, char *buffer) {
    if (name && name[0] == '/') return name;
    if (descriptor == AT_FDCWD) return name ? name : "";
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, buffer, PATH_MAX - 1);
    if (length < 0) return "";
    buffer[length] = 0;
    if (name && length + strlen(name) + 2 < PATH_MAX) {
        strcat(buffer, "/");
        strcat(buffer, name);
    }
    return buffer;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define BREAK(call, descriptor, name, code)                                    \
    do {                                                                       \
        char buffer[PATH_MAX];                                                 \
        if (breaks(call, of(descriptor, name, buffer), code)) return -1;       \
    } while (0)

#define OPEN(name)                                                             \
    int name(const char *path, int flags, ...) {                               \
        va_list more;                                                          \
        va_start(more, flags);                                                 \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                          \
        BREAK("open", AT_FDCWD, path, flags & O_CREAT ? ENOSPC : EIO);         \
        return REAL(name)(path, flags, mode);                                  \
    }
#define OPENAT(name)                                                           \
    int name(int folder, const char *path, int flags, ...) {                   \
        va_list more;                                                          \
        va_start(more, flags);                                                 \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                          \
        BREAK("open", folder, path, flags & O_CREAT ? ENOSPC : EIO);           \
        return REAL(name)(folder, path, flags, mode);                          \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *data, size_t length) {
    BREAK("write", file, NULL, ENOSPC);
    return REAL(write)(file, data, length);
}
ssize_t writev(int file, const struct iovec *parts, int number) {
    BREAK("write", file, NULL, ENOSPC);
    return REAL(writev)(file, parts, number);
}
ssize_t pwrite64(int file, const void *data, size_t length, off64_t from) {
    BREAK("write", file, NULL, ENOSPC);
    return REAL(pwrite64)(file, data, length, from);
}
ssize_t copy_file_range(int from, off64_t *at_from, int to, off64_t *at_to, size_t length, unsigned flags) {
    BREAK("write", to, NULL, ENOSPC);
    return REAL(copy_file_range)(from, at_from, to, at_to, length, flags);
}
int ftruncate64(int file, off64_t length) {
    BREAK("truncate", file, NULL, ENOSPC);
    return REAL(ftruncate64)(file, length);
}
int fsync(int file) {
    BREAK("sync", file, NULL, EIO);
    return REAL(fsync)(file);
}
int fdatasync(int file) {
    BREAK("sync", file, NULL, EIO);
    return REAL(fdatasync)(file);
}
int fchmod(int file, mode_t mode) {
    BREAK("chmod", file, NULL, EIO);
    return REAL(fchmod)(file, mode);
}
int chmod(const char *path, mode_t mode) {
    BREAK("chmod", AT_FDCWD, path, EIO);
    return REAL(chmod)(path, mode);
}
int rename(const char *from, const char *to) {
    BREAK("rename", AT_FDCWD, to, EIO);
    return REAL(rename)(from, to);
}
int link(const char *from, const char *to) {
    BREAK("link", AT_FDCWD, to, EIO);
    return REAL(link)(from, to);
}
int linkat(int of_from, const char *from, int of_to, const char *to, int flags) {
    BREAK("link", of_to, to, EIO);
    return REAL(linkat)(of_from, from, of_to, to, flags);
}
int mkdir(const char *path, mode_t mode) {
    BREAK("mkdir", AT_FDCWD, path, ENOSPC);
    return REAL(mkdir)(path, mode);
}
int unlink(const char *path) {
    BREAK("unlink", AT_FDCWD, path, EIO);
    return REAL(unlink)(path);
}
int unlinkat(int folder, const char *path, int flags) {
    BREAK("unlink", folder, path, EIO);
    return REAL(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) {
    BREAK("rmdir", AT_FDCWD, path, EIO);
    return REAL(rmdir)(path);
}
