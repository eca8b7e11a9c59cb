/* A preloaded library whose system calls on chosen files fail, with the error number of a failing disk or server.
 *
 * The file named by FAILING_FILES holds one line, "CALL ERRNO RANK TEXT": CALL (open, read or write) fails with ERRNO
 * in the process whose variable RANK has that value, for every path that contains TEXT. Without the file all calls
 * succeed. Reading through a memory map is no call, and does not fail.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

/* Sets errno and returns 1 if `call` fails for a path, or without one for the file of a descriptor. */
static int fails(const char *call, const char *path, int descriptor) {
  const char *control = getenv("FAILING_FILES"), *rank = getenv("RANK");
  if (!control || !rank) return 0;
  int before = errno, number = 0;
  int file = syscall(SYS_openat, AT_FDCWD, control, O_RDONLY | O_CLOEXEC, 0);
  errno = before;
  if (file < 0) return 0;
  char line[512] = "", named[8], of[8], text[256], link[64], found[4096] = "";
  ssize_t length = syscall(SYS_read, file, line, sizeof line - 1);
  syscall(SYS_close, file);
  errno = before;
  if (length <= 0 || sscanf(line, "%7s %d %7s %255s", named, &number, of, text) != 4) return 0;
  if (strcmp(named, call) || strcmp(of, rank)) return 0;
  if (!path) {
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    if (syscall(SYS_readlink, link, found, sizeof found - 1) < 0) found[0] = 0;
    path = found;
  }
  if (!strstr(path, text)) return 0;
  errno = number;
  return 1;
}

static int opened(int directory, const char *path, int flags, mode_t mode) {
  return fails("open", path, -1) ? -1 : syscall(SYS_openat, directory, path, flags, mode);
}

#define MODE(flags) \
  mode_t mode = 0; \
  if ((flags) & (O_CREAT | __O_TMPFILE)) { \
    va_list more; \
    va_start(more, flags); \
    mode = va_arg(more, mode_t); \
    va_end(more); \
  }

int open(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags) return opened(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags) return opened(at, path, flags, mode); }

ssize_t read(int file, void *into, size_t size) {
  return fails("read", NULL, file) ? -1 : syscall(SYS_read, file, into, size);
}

ssize_t write(int file, const void *from, size_t size) {
  return fails("write", NULL, file) ? -1 : syscall(SYS_write, file, from, size);
}
