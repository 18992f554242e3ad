// Many rows at once through the codec of rows.h.
#include "kernels.h"
#include "rows.h"

using penumbra::Pool;

namespace {
constexpr int64_t kAlone = 64;  // rows below which a second thread costs more than it brings
}

extern "C" {

// rows [count], values [count, dim]; only rows of the sink item may repeat.
void penumbra_write_rows(const Pool* pool, const int64_t* rows, const float* values, int64_t count, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > kAlone)
    for (int64_t i = 0; i < count; ++i) {
        const int64_t n = pool->rows_per_item;
        penumbra::encode_row(*pool, rows[i] / n, rows[i] % n, values + i * pool->dim);
    }
}

void penumbra_read_rows(const Pool* pool, const int64_t* rows, float* values, int64_t count, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > kAlone)
    for (int64_t i = 0; i < count; ++i) {
        const int64_t n = pool->rows_per_item;
        penumbra::decode_row(*pool, rows[i] / n, rows[i] % n, values + i * pool->dim);
    }
}

}  // extern "C"
