/* json.c: a checker that keeps its nesting in the bits of an integer, and a walk over checked texts. */
#define _GNU_SOURCE /* uselocale */
#include "json.h"

#include <float.h>
#include <locale.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- scanning: each function returns the byte after its item, or NULL where there is none ---- */

static const char *skip_space(const char *at) {
    while (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r') at++;
    return at;
}

static bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

static const char *scan_digits(const char *at) {
    if (!is_digit(*at)) return NULL;
    while (is_digit(*at)) at++;
    return at;
}

static const char *scan_number(const char *at) {
    if (*at == '-') at++;
    at = *at == '0' ? at + 1 : scan_digits(at);
    if (at && *at == '.') at = scan_digits(at + 1);
    if (at && (*at == 'e' || *at == 'E')) {
        at++;
        if (*at == '+' || *at == '-') at++;
        at = scan_digits(at);
    }
    return at;
}

static int hex_digit(char c) {
    if (is_digit(c)) return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* The code unit of four hexadecimal digits, -1 where they are something else. */
static int hex_unit(const char *at) {
    int unit = 0;
    for (int i = 0; i < 4; i++) {
        int digit = hex_digit(at[i]);
        if (digit < 0) return -1;
        unit = unit * 16 + digit;
    }
    return unit;
}

static const char *scan_string(const char *at) {
    if (*at != '"') return NULL;
    for (at++; *at != '"'; at++) {
        if ((unsigned char)*at < 0x20) return NULL; /* the zero byte at the end, too */
        if (*at != '\\') continue;
        at++;
        if (*at == 'u') {
            if (hex_unit(at + 1) < 0) return NULL;
            at += 4;
        } else if (!*at || !strchr("\"\\/bfnrt", *at)) {
            return NULL;
        }
    }
    return at + 1;
}

static const char *scan_word(const char *at, const char *word) {
    size_t n = strlen(word);
    return strncmp(at, word, n) ? NULL : at + n;
}

static enum json_kind kind_at(const char *at) {
    switch (*at) {
    case '{':
        return JSON_OBJECT;
    case '[':
        return JSON_ARRAY;
    case '"':
        return JSON_STRING;
    case 't':
        return JSON_TRUE;
    case 'f':
        return JSON_FALSE;
    case 'n':
        return JSON_NULL;
    }
    return JSON_NUMBER;
}

static const char *scan_scalar(const char *at) {
    switch (kind_at(at)) {
    case JSON_STRING:
        return scan_string(at);
    case JSON_TRUE:
        return scan_word(at, "true");
    case JSON_FALSE:
        return scan_word(at, "false");
    case JSON_NULL:
        return scan_word(at, "null");
    default:
        return scan_number(at);
    }
}

/* A member's name and its colon. */
static const char *scan_key(const char *at) {
    at = scan_string(skip_space(at));
    if (!at) return NULL;
    at = skip_space(at);
    return *at == ':' ? at + 1 : NULL;
}

/* ---- checking ---- */

/* The containers around a position: bit 0 of `objects` is 1 where the innermost is an object. */
typedef struct nesting {
    uint64_t objects;
    int depth;
} nesting;

/* What comes after a whole value: a comma (and a name), or the ends of containers. *done where the
 * outermost value is whole. *at is the place of a fault where this is false. */
static bool after_value(const char **at, nesting *in, bool *done) {
    for (;;) {
        *at = skip_space(*at);
        *done = in->depth == 0;
        if (*done) return true;
        bool object = in->objects & 1;
        if (**at == ',') {
            const char *next = object ? scan_key(*at + 1) : *at + 1;
            if (next) *at = next;
            return next != NULL;
        }
        if (**at != (object ? '}' : ']')) return false;
        ++*at, in->depth--, in->objects >>= 1;
    }
}

/* Enters an array or an object; *empty where it is left at once. */
static bool enter(const char **at, nesting *in, bool *empty) {
    bool object = **at == '{';
    in->objects = in->objects << 1 | object;
    in->depth++;
    const char *inside = skip_space(*at + 1);
    *empty = *inside == (object ? '}' : ']');
    if (*empty) {
        *at = inside; /* after_value leaves it */
        return true;
    }
    const char *next = object ? scan_key(inside) : inside;
    if (next) *at = next;
    return next != NULL;
}

/* The byte after the value of a text; NULL, with the place of the fault, where it is none. */
static const char *check_value(const char *at, const char **fault, const char **why) {
    nesting in = {0};
    bool done = false, empty;
    *why = "is not JSON";
    while (!done) {
        at = skip_space(at);
        *fault = at;
        if (*at == '{' || *at == '[') {
            if (in.depth == JSON_MAX_DEPTH) {
                *why = "is JSON that is nested too deep";
                return NULL;
            }
            bool fine = enter(&at, &in, &empty);
            *fault = at;
            if (!fine) return NULL;
            if (!empty) continue;
        } else {
            at = scan_scalar(at);
            if (!at) return NULL;
        }
        bool fine = after_value(&at, &in, &done);
        *fault = at;
        if (!fine) return NULL;
    }
    return at;
}

int json_parse(const char *text, size_t n, const char *where, json_value *out) {
    const char *fault, *why, *end = check_value(text, &fault, &why);
    if (end && end != text + n) fault = end, end = NULL;
    if (!end)
        return fail(GPT_ERR_FILE, "%s %s from byte %zu on", where, why, (size_t)(fault - text));
    const char *begin = skip_space(text);
    *out = (json_value){kind_at(begin), begin, end};
    return GPT_OK;
}

/* ---- reading a checked text ---- */

static const char *skip_value(const char *at) {
    int depth = 0;
    do {
        at = skip_space(at);
        if (*at == '{' || *at == '[')
            depth++, at++;
        else if (*at == '}' || *at == ']')
            depth--, at++;
        else if (*at == ',' || *at == ':')
            at++;
        else
            at = scan_scalar(at);
    } while (depth > 0);
    return at;
}

json_walk json_inside(json_value container) {
    return (json_walk){container.begin, container.kind == JSON_OBJECT};
}

bool json_next(json_walk *walk, json_value *key, json_value *value) {
    const char *at = skip_space(walk->at);
    if (*at == '}' || *at == ']') return false;
    at = skip_space(at + 1); /* after the bracket that begins the container, or a comma */
    if (*at == '}' || *at == ']') return false;
    if (walk->keys) {
        *key = (json_value){JSON_STRING, at, scan_string(at)};
        at = skip_space(skip_space(key->end) + 1);
    }
    *value = (json_value){kind_at(at), at, skip_value(at)};
    walk->at = value->end;
    return true;
}

int json_find(json_value object, const char *name, json_value *out) {
    json_walk walk = json_inside(object);
    json_value key, value;
    int found = 0;
    while (json_next(&walk, &key, &value)) {
        if (!json_is(key, name)) continue;
        *out = value;
        found++;
    }
    return found;
}

/* Decodes the character at *at, which moves behind it, into at most three bytes. */
static int decode(const char **at, char out[3]) {
    static const char escapes[] = "bfnrt", meant[] = "\b\f\n\r\t";
    if (**at != '\\') {
        out[0] = *(*at)++;
        return 1;
    }
    char c = (*at)[1];
    *at += 2;
    if (c != 'u') {
        const char *found = strchr(escapes, c);
        out[0] = found ? meant[found - escapes] : c;
        return 1;
    }
    int unit = hex_unit(*at);
    *at += 4;
    if (unit < 0x80) {
        out[0] = (char)unit;
        return 1;
    }
    if (unit < 0x800) {
        out[0] = (char)(0xc0 | unit >> 6);
        out[1] = (char)(0x80 | (unit & 0x3f));
        return 2;
    }
    out[0] = (char)(0xe0 | unit >> 12);
    out[1] = (char)(0x80 | (unit >> 6 & 0x3f));
    out[2] = (char)(0x80 | (unit & 0x3f));
    return 3;
}

bool json_is(json_value value, const char *text) {
    if (value.kind != JSON_STRING) return false;
    size_t n = strlen(text);
    char bytes[3];
    for (const char *at = value.begin + 1; at < value.end - 1;) {
        size_t k = (size_t)decode(&at, bytes);
        if (k > n || memcmp(bytes, text, k)) return false;
        text += k, n -= k;
    }
    return n == 0;
}

size_t json_string(json_value value, char *out) {
    size_t n = 0;
    char bytes[3];
    for (const char *at = value.begin + 1; at < value.end - 1;) {
        int k = decode(&at, bytes);
        memcpy(out + n, bytes, (size_t)k);
        n += (size_t)k;
    }
    out[n] = 0;
    return n;
}

bool json_int(json_value value, int64_t least, int64_t most, int64_t *out) {
    if (value.kind != JSON_NUMBER) return false;
    bool negative = *value.begin == '-';
    int64_t n = 0;
    for (const char *at = value.begin + negative; at < value.end; at++) {
        /* Counted below zero, where there is one number more. */
        if (!is_digit(*at) || __builtin_mul_overflow(n, 10, &n) ||
            __builtin_sub_overflow(n, *at - '0', &n))
            return false;
    }
    if (!negative && __builtin_sub_overflow(0, n, &n)) return false;
    if (n < least || n > most) return false;
    *out = n;
    return true;
}

bool json_float(json_value value, float *out) {
    if (value.kind != JSON_NUMBER) return false;
    /* The caller's locale may have a comma for the point. */
    locale_t plain = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    if (!plain) return false;
    locale_t before = uselocale(plain);
    double x = strtod(value.begin, NULL);
    uselocale(before);
    freelocale(plain);
    if (!(fabs(x) <= (double)FLT_MAX)) return false;
    *out = (float)x;
    return true;
}
