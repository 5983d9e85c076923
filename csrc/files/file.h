/* file.h: reading files of a checkpoint, and naming them in errors. */
#ifndef GPT_FILE_H
#define GPT_FILE_H

#include "error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A file that is open for reading. */
typedef struct file {
    char *path;
    int descriptor; /* -1: none */
    int64_t size;
} file;

/* Opens folder/name. GPT_ERR_FILE where it cannot be read, is not a regular file, or is a pointer of Git
 * LFS, which `git clone` leaves in the place of a large file. */
int file_open(const char *folder, const char *name, file *out);
/* Whether there is anything of that name. */
bool file_exists(const char *folder, const char *name);
void file_close(file *f);
/* The n bytes from `offset` on. GPT_ERR_FILE where the file ends before. */
int file_read(const file *f, int64_t offset, void *out, size_t n);
/* n bytes, and a zero byte after them; to be freed. */
int file_text(const file *f, int64_t offset, size_t n, char **out);

/* A text as an error may show it: at most SHOWN bytes, without control characters. The end of a path is
 * what differs, so that `tail` keeps that. */
enum { SHOWN = 160 };
typedef struct shown {
    char text[SHOWN + 1];
} shown;
shown show(const char *text, size_t n);
shown show_tail(const char *text);

#endif
