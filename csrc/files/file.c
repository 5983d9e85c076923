#define _GNU_SOURCE /* strerror_r */
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

shown show(const char *text, size_t n) {
    shown out = {{0}};
    for (size_t i = 0; i < n && i < SHOWN; i++) {
        unsigned char c = (unsigned char)text[i];
        out.text[i] = c < 0x20 || c == 0x7f ? '?' : text[i];
    }
    return out;
}

shown show_tail(const char *text) {
    size_t n = strlen(text), cut = n > SHOWN ? n - SHOWN : 0;
    shown out = show(text + cut, n - cut);
    if (cut) memcpy(out.text, "...", 3);
    return out;
}

static int unreadable(const file *f, int error) {
    char text[128];
    return fail(GPT_ERR_FILE, "cannot read %s: %s", show_tail(f->path).text,
                strerror_r(error, text, sizeof text));
}

static int refuse_pointer(const file *f) {
    static const char begin[] = "version https://git-lfs.github.com/spec/";
    char found[sizeof begin - 1];
    if (f->size < (int64_t)sizeof found) return GPT_OK;
    TRY(file_read(f, 0, found, sizeof found));
    if (memcmp(found, begin, sizeof found)) return GPT_OK;
    return fail(GPT_ERR_FILE,
                "%s is a pointer of Git LFS to a file, and not the file: run git lfs pull in its "
                "folder, or download it",
                show_tail(f->path).text);
}

static int open_path(file *f) {
    /* A pipe or a device would be waited for. */
    f->descriptor = open(f->path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (f->descriptor < 0) return unreadable(f, errno);
    struct stat status;
    if (fstat(f->descriptor, &status)) return unreadable(f, errno);
    if (!S_ISREG(status.st_mode))
        return fail(GPT_ERR_FILE, "%s is not a file", show_tail(f->path).text);
    f->size = status.st_size;
    return refuse_pointer(f);
}

/* To be freed; NULL without memory. */
static char *join(const char *folder, const char *name) {
    size_t n = strlen(folder) + strlen(name) + 2;
    char *path = malloc(n);
    if (path) snprintf(path, n, "%s/%s", folder, name);
    return path;
}

bool file_exists(const char *folder, const char *name) {
    char *path = join(folder, name);
    bool exists = path && !access(path, F_OK);
    free(path);
    return exists;
}

int file_open(const char *folder, const char *name, file *out) {
    *out = (file){.path = join(folder, name), .descriptor = -1};
    if (!out->path) return fail(GPT_ERR_MEMORY, "no memory for a path");
    int status = open_path(out);
    if (status != GPT_OK) file_close(out);
    return status;
}

void file_close(file *f) {
    if (f->path && f->descriptor >= 0) close(f->descriptor);
    free(f->path);
    *f = (file){.descriptor = -1};
}

int file_read(const file *f, int64_t offset, void *out, size_t n) {
    for (size_t done = 0; done < n;) {
        ssize_t k = pread(f->descriptor, (char *)out + done, n - done, (off_t)offset + (off_t)done);
        if (k < 0 && errno == EINTR) continue;
        if (k < 0) return unreadable(f, errno);
        if (k == 0) return fail(GPT_ERR_FILE, "%s is truncated", show_tail(f->path).text);
        done += (size_t)k;
    }
    return GPT_OK;
}

int file_text(const file *f, int64_t offset, size_t n, char **out) {
    char *text = malloc(n + 1);
    if (!text)
        return fail(GPT_ERR_MEMORY, "no memory for %zu bytes of %s", n, show_tail(f->path).text);
    int status = file_read(f, offset, text, n);
    if (status != GPT_OK) {
        free(text);
        return status;
    }
    text[n] = 0;
    *out = text;
    return GPT_OK;
}
