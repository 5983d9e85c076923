/* upload, download, download_rows. */
#include "testing.h"

/* An upload arrives, though the host's memory is used again at once: many small pieces, and
 * more of large ones than any device has on its way at a time. */
static void test_uploads(void) {
    enum { N = 40, SMALL = 100, LARGE = (3 << 20) + 7 };
    test_case("%d uploads", N);
    unsigned char *host = test_alloc(&test.host, LARGE);
    EACH_BACKEND {
        void *device[N];
        for (int i = 0; i < N; i++) {
            size_t bytes = i % 4 == 3 ? LARGE : SMALL;
            device[i] = test_device_alloc(bytes, 0);
            memset(host, i + 1, bytes);
            test.ops->upload(test.ctx, device[i], host, bytes);
            memset(host, 0xee, bytes);
        }
        for (int i = 0; i < N; i++) {
            size_t bytes = i % 4 == 3 ? LARGE : SMALL, n_wrong = 0;
            memset(host, 0, bytes);
            test.ops->download(test.ctx, host, device[i], bytes);
            for (size_t k = 0; k < bytes; k++) n_wrong += host[k] != i + 1;
            EXPECT(n_wrong == 0);
        }
    }
}

/* Rows that are apart on the device are not on the host; shorter and longer ones than the pieces in which
 * they arrive. */
static void test_rows(void) {
    static const size_t shapes[][3] = {{1, 1, 1},
                                       {3, 4, 4},
                                       {5, 7, 100},
                                       {4000, 1001, 1001},
                                       {900, 4001, 4096},
                                       {3, 2000000, 2000001},
                                       {2, 2 << 20, 2 << 20},
                                       {7, 1, 1 << 20},
                                       {0, 4, 4}};
    for (int k = 0; k < TEST_COUNT(shapes); k++) {
        size_t rows = shapes[k][0], bytes = shapes[k][1], stride = shapes[k][2];
        test_case("%zu rows of %zu bytes, %zu apart", rows, bytes, stride);
        unsigned char *there = test_alloc(&test.host, rows * stride + 1);
        unsigned char *got = test_alloc(&test.host, rows * bytes + 1);
        for (size_t i = 0; i < rows * stride; i++) there[i] = (unsigned char)(i * 7 + i / 251);
        EACH_BACKEND {
            size_t n_wrong = 0;
            void *device = test_device_alloc(rows * stride, 0);
            test.ops->upload(test.ctx, device, there, rows * stride);
            memset(got, 0xee, rows * bytes + 1);
            test.ops->download_rows(test.ctx, got, device, (int)rows, bytes, stride);
            for (size_t r = 0; r < rows; r++)
                n_wrong += memcmp(got + r * bytes, there + r * stride, bytes) != 0;
            EXPECT(n_wrong == 0 && got[rows * bytes] == 0xee);
        }
    }
}

TEST_OPS_MAIN({"uploads", test_uploads}, {"rows", test_rows})
