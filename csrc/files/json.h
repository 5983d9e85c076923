/* json.h: a strict reader of JSON (RFC 8259) in memory, for files from strangers. It allocates nothing
 * and does not recurse. json_parse checks a whole text; the other functions read a checked one, and
 * cannot fail because of it. Bytes from 128 on are not looked at. */
#ifndef GPT_JSON_H
#define GPT_JSON_H

#include "error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Arrays and objects inside each other; a bit of an int64 for each. */
enum { JSON_MAX_DEPTH = 64 };

enum json_kind {
    JSON_NULL,
    JSON_FALSE,
    JSON_TRUE,
    JSON_NUMBER,
    JSON_STRING,
    JSON_ARRAY,
    JSON_OBJECT
};

/* A value in a text: its first byte, and the byte after its last. */
typedef struct json_value {
    enum json_kind kind;
    const char *begin, *end;
} json_value;

/* The value of text (n), after which there is a zero byte. `where` is the text's name in errors. */
int json_parse(const char *text, size_t n, const char *where, json_value *out);

/* The members of an object, or the items of an array: `json_walk w = json_inside(v);
 * while (json_next(&w, &key, &value))`. An array leaves the key as it is. */
typedef struct json_walk {
    const char *at;
    bool keys;
} json_walk;
json_walk json_inside(json_value container);
bool json_next(json_walk *walk, json_value *key, json_value *value);

/* How many members of an object have this name; *out is the last of them. */
int json_find(json_value object, const char *name, json_value *out);

/* Whether a value is this string. */
bool json_is(json_value value, const char *text);
/* The bytes of a string, with a zero byte after them; out has room for end - begin bytes. Returns their
 * number. An escape \uXXXX becomes the UTF-8 of that code unit. */
size_t json_string(json_value value, char *out);
/* False unless the value is a whole number, without point and exponent, that is within these bounds. */
bool json_int(json_value value, int64_t least, int64_t most, int64_t *out);
/* False unless the value is a number that a float can hold, perhaps rounded. */
bool json_float(json_value value, float *out);

#endif
