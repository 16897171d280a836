/* Preloaded into a VM: ends it at a chosen sync or rename below a directory, and keeps
 * what was synced by then, so that a power cut can be played.
 *
 *   BOUNDARY_UNDER   the directory; calls on other files do not count
 *   BOUNDARY_LOG     gets a line for each call
 *   BOUNDARY_KILL    the number of the call, from 1, before which the VM is killed, or what
 *                    it does: the first that does it
 *   BOUNDARY_SHADOW  gets what each synced file held, and which files each synced
 *                    directory held, under the number of the inode
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static atomic_int calls;

static int is_below(const char *path) {
  const char *under = getenv("BOUNDARY_UNDER");
  return under && strncmp(path, under, strlen(under)) == 0;
}

/* One call more; this process may end here. */
static void boundary(const char *what, const char *path) {
  int number = atomic_fetch_add(&calls, 1) + 1;
  const char *log = getenv("BOUNDARY_LOG");
  const char *last = getenv("BOUNDARY_KILL");
  if (log) {
    int fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);
    char line[PATH_MAX + 32];
    int length = snprintf(line, sizeof line, "%s %s\n", what, path);
    if (write(fd, line, length) != length) abort();
    close(fd);
  }
  if (last && (atoi(last) == number || !strcmp(last, what))) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
}

static int shadow_file(ino_t inode) {
  char path[PATH_MAX];
  snprintf(path, sizeof path, "%s/%llu", getenv("BOUNDARY_SHADOW"), (unsigned long long)inode);
  return open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
}

static void keep_file(const char *path, ino_t inode) {
  int from = open(path, O_RDONLY), to = shadow_file(inode);
  char buffer[1 << 16];
  ssize_t size;
  while (from >= 0 && (size = read(from, buffer, sizeof buffer)) > 0)
    if (write(to, buffer, size) != size) abort();
  close(from);
  close(to);
}

static void keep_directory(const char *path, ino_t inode) {
  DIR *directory = opendir(path);
  struct dirent *entry;
  int to = shadow_file(inode);
  while (directory && (entry = readdir(directory)))
    if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
      dprintf(to, "%llu %s\n", (unsigned long long)entry->d_ino, entry->d_name);
  if (directory) closedir(directory);
  close(to);
}

static void keep(const char *path) {
  struct stat stat_;
  if (!getenv("BOUNDARY_SHADOW") || stat(path, &stat_)) return;
  if (S_ISDIR(stat_.st_mode)) keep_directory(path, stat_.st_ino);
  if (S_ISREG(stat_.st_mode)) keep_file(path, stat_.st_ino);
}

static int synced(const char *what, int fd) {
  char link[64], path[PATH_MAX];
  int (*call)(int) = (int (*)(int))dlsym(RTLD_NEXT, what);
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  path[length < 0 ? 0 : length] = 0;
  if (!is_below(path)) return call(fd);
  boundary(what, path);
  int result = call(fd);
  if (result == 0) keep(path);
  return result;
}

int fsync(int fd) { return synced("fsync", fd); }
int fdatasync(int fd) { return synced("fdatasync", fd); }

int rename(const char *from, const char *to) {
  int (*call)(const char *, const char *) =
      (int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename");
  if (is_below(to)) boundary("rename", to);
  return call(from, to);
}

int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
  int (*call)(int, const char *, int, const char *, unsigned) =
      (int (*)(int, const char *, int, const char *, unsigned))dlsym(RTLD_NEXT, "renameat2");
  if (is_below(to)) boundary(flags & RENAME_EXCHANGE ? "exchange" : "rename", to);
  return call(from_dir, from, to_dir, to, flags);
}

int unlink(const char *path) {
  int (*call)(const char *) = (int (*)(const char *))dlsym(RTLD_NEXT, "unlink");
  if (is_below(path)) boundary("unlink", path);
  return call(path);
}
