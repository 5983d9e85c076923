/* upload, download. */
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

TEST_OPS_MAIN({"uploads", test_uploads})
