/* The JSON reader of files/: what is JSON, what is not and from which byte on, and the values. */
#include "testing.h"

#include "files/json.h"

#include <locale.h>

static int parse(const char *text, json_value *out) {
    return json_parse(text, strlen(text), "text", out);
}

static void test_whole_texts(void) {
    static const struct {
        const char *text;
        enum json_kind kind;
    } fine[] = {
        {"null", JSON_NULL},
        {" true\n", JSON_TRUE},
        {"\tfalse ", JSON_FALSE},
        {"0", JSON_NUMBER},
        {"-0.5e-07", JSON_NUMBER},
        {"1E+3", JSON_NUMBER},
        {"\"\"", JSON_STRING},
        {"\"\\u00e9\\n\\\\ \\/\"", JSON_STRING},
        {"[]", JSON_ARRAY},
        {"[ ]", JSON_ARRAY},
        {"[1, [2, {}], {\"a\": []} ]", JSON_ARRAY},
        {"{}", JSON_OBJECT},
        {" { \"a\" : 1 , \"b\":[ ] } ", JSON_OBJECT},
    };
    for (int i = 0; i < TEST_COUNT(fine); i++) {
        json_value value = {0};
        test_case("%s", fine[i].text);
        EXPECT(parse(fine[i].text, &value) == GPT_OK);
        EXPECT(value.kind == fine[i].kind);
    }
}

static void test_other_texts(void) {
    static const struct {
        const char *text;
        int byte;
    } wrong[] = {
        {"", 0},          {" ", 1},        {"nul", 0},         {"nulll", 4},
        {"1 2", 2},       {"01", 1},       {"+1", 0},          {"-", 0},
        {"1.", 0},        {".5", 0},       {"1e", 0},          {"0x10", 1},
        {"NaN", 0},       {"Infinity", 0}, {"'a'", 0},         {"\"a", 0},
        {"\"\\x\"", 0},   {"\"\\u12", 0},  {"\"\\u12g4\"", 0}, {"\"\n\"", 0},
        {"[", 1},         {"[1", 2},       {"[1,", 3},         {"[1,]", 3},
        {"[,1]", 1},      {"[1 2]", 3},    {"[1}", 2},         {"{]", 0},
        {"{", 0},         {"{\"a\"", 0},   {"{\"a\":", 5},     {"{\"a\":1,}", 6},
        {"{\"a\" 1}", 0}, {"{1:2}", 0},    {"{\"a\":1]", 6},   {"{\"a\":1}}", 7},
        {"]", 0},         {"[1]\v", 3},    {"// a\n1", 0},
    };
    for (int i = 0; i < TEST_COUNT(wrong); i++) {
        json_value value;
        char want[64];
        test_case("%s", wrong[i].text);
        snprintf(want, sizeof want, "text is not JSON from byte %d on", wrong[i].byte);
        EXPECT(parse(wrong[i].text, &value) == GPT_ERR_FILE);
        if (strcmp(gpt_last_error(), want))
            test_fail(__FILE__, __LINE__, "'%s', want '%s'", gpt_last_error(), want);
    }
    json_value value;
    EXPECT(json_parse("1\0", 2, "text", &value) == GPT_ERR_FILE);
    EXPECT(json_parse("\"\0\"", 3, "text", &value) == GPT_ERR_FILE);
}

/* A bit each is all that a level costs, so that no text can make the reader recurse. */
static void test_depth(void) {
    enum { N = 1 << 20 };
    static char text[N + 1];
    json_value value;
    for (int objects = 0; objects < 2; objects++) {
        for (int depth = JSON_MAX_DEPTH - 1; depth < JSON_MAX_DEPTH + 2; depth++) {
            char *at = text;
            test_case("depth=%d objects=%d", depth, objects);
            for (int i = 0; i < depth; i++) at = stpcpy(at, objects ? "{\"a\":" : "[");
            at = stpcpy(at, "1");
            for (int i = 0; i < depth; i++) at = stpcpy(at, objects ? "}" : "]");
            EXPECT((parse(text, &value) == GPT_OK) == (depth <= JSON_MAX_DEPTH));
        }
        memset(text, objects ? '{' : '[', N);
        text[N] = 0;
        EXPECT(parse(text, &value) == GPT_ERR_FILE);
    }
    memset(text, '[', N);
    parse(text, &value);
    EXPECT(strstr(gpt_last_error(), "nested too deep"));
}

static void test_members(void) {
    json_value root, key = {0}, value;
    const char *text = "{\"a\":[1,[2,3],{\"x\":\"]\"}],\"b\":{}, \"\\u0061b\":-7,\"a\":null}";
    EXPECT(parse(text, &root) == GPT_OK);
    EXPECT(json_find(root, "a", &value) == 2 && value.kind == JSON_NULL);
    EXPECT(json_find(root, "ab", &value) == 1 && value.kind == JSON_NUMBER);
    EXPECT(json_find(root, "c", &value) == 0 && json_find(root, "", &value) == 0);
    json_walk walk = json_inside(root);
    EXPECT(json_next(&walk, &key, &value) && json_is(key, "a") && value.kind == JSON_ARRAY);
    json_walk items = json_inside(value);
    static const enum json_kind kinds[] = {JSON_NUMBER, JSON_ARRAY, JSON_OBJECT};
    for (int i = 0; i < 3; i++) EXPECT(json_next(&items, &key, &value) && value.kind == kinds[i]);
    EXPECT(!json_next(&items, &key, &value));
    EXPECT(json_next(&walk, &key, &value) && json_is(key, "b") && value.kind == JSON_OBJECT);
    items = json_inside(value);
    EXPECT(!json_next(&items, &key, &value));
    EXPECT(json_next(&walk, &key, &value) && json_next(&walk, &key, &value));
    EXPECT(!json_next(&walk, &key, &value));
}

static void test_strings(void) {
    json_value value;
    char out[64];
    EXPECT(parse("\"a\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0041\\u00e9\\u20AC!\"", &value) == GPT_OK);
    const char *want = "a\"\\/\b\f\n\r\tA\xc3\xa9\xe2\x82\xac!";
    EXPECT(json_string(value, out) == strlen(want) && !strcmp(out, want));
    EXPECT(json_is(value, want));
    EXPECT(!json_is(value, "a") && !json_is(value, "") && !json_is(value, "a\"\\/\b\f\n\r\tA\xc3"));
    EXPECT(parse("\"\\u0000\"", &value) == GPT_OK && json_string(value, out) == 1);
    EXPECT(parse("3", &value) == GPT_OK && !json_is(value, "3"));
}

static void test_numbers(void) {
    static const struct {
        const char *text;
        int64_t want;
    } ints[] = {{"0", 0},
                {"-0", 0},
                {"41", 41},
                {"-3", -3},
                {"9223372036854775807", INT64_MAX},
                {"-9223372036854775808", INT64_MIN}};
    static const char *const others[] = {
        "1.0",   "1e2", "9223372036854775808", "-9223372036854775809", "99999999999999999999",
        "\"1\"", "true"};
    json_value value;
    int64_t n;
    float x;
    for (int i = 0; i < TEST_COUNT(ints); i++) {
        test_case("%s", ints[i].text);
        EXPECT(parse(ints[i].text, &value) == GPT_OK);
        EXPECT(json_int(value, INT64_MIN, INT64_MAX, &n) && n == ints[i].want);
    }
    for (int i = 0; i < TEST_COUNT(others); i++) {
        test_case("%s", others[i]);
        EXPECT(parse(others[i], &value) == GPT_OK && !json_int(value, INT64_MIN, INT64_MAX, &n));
    }
    EXPECT(parse("5", &value) == GPT_OK);
    EXPECT(!json_int(value, 6, 9, &n) && !json_int(value, 0, 4, &n) && json_int(value, 5, 5, &n));
    setlocale(LC_ALL, "de_DE.UTF-8"); /* a comma for the point, where this machine has it */
    EXPECT(parse("1e-05", &value) == GPT_OK && json_float(value, &x) && x == 1e-5f);
    EXPECT(parse("10000.25", &value) == GPT_OK && json_float(value, &x) && x == 10000.25f);
    setlocale(LC_ALL, "C");
    EXPECT(parse("-3", &value) == GPT_OK && json_float(value, &x) && x == -3.0f);
    EXPECT(parse("1e39", &value) == GPT_OK && !json_float(value, &x));
    EXPECT(parse("1e999999", &value) == GPT_OK && !json_float(value, &x));
    EXPECT(parse("1e-999999", &value) == GPT_OK && json_float(value, &x) && x == 0);
    EXPECT(parse("\"1\"", &value) == GPT_OK && !json_float(value, &x));
}

TEST_API_MAIN({"whole texts", test_whole_texts}, {"other texts", test_other_texts},
              {"depth", test_depth}, {"members", test_members}, {"strings", test_strings},
              {"numbers", test_numbers})
