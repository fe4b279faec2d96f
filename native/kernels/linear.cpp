#include "../threads.hpp"
#include "kernels.hpp"
#include "product.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

// The rows of one slice: panel row g * rows + t holds x[t, g, :], so that each group's rows lie together.
void pack_groups(Format format, const float* x, float* panels, int64_t rows, int64_t groups, int64_t in,
                 int32_t threads) {
    split_rows(rows * groups, rows * groups * in, threads, [=](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            pack_row(format, x + (i % rows * groups + i / rows) * in, in, panels, rows * groups, i);
        }
    });
}

void multiply_groups(const Matrix& weight, const float* panels, float* y, int64_t rows, int64_t groups,
                     int32_t threads) {
    const int64_t out = weight.out / groups, each = quads(out);
    split_rows(groups * each, rows * weight.out * weight.in, threads, [=, &weight](int64_t first, int64_t last) {
        for (int64_t unit = first; unit < last;) {  // units of four weight rows of one group
            const int64_t group = unit / each, stop = smaller(last, (group + 1) * each), start = group * out;
            const Product product{weight, panels, rows * groups, group * rows, rows, y, weight.out, nullptr, 0, false};
            multiply(product, start + (unit - group * each) * kQuad,
                     start + smaller(out, (stop - group * each) * kQuad));
            unit = stop;
        }
    });
}

}  // namespace

void linear(const float* x, const void* codes, const void* scale, float* y, float* panels, int64_t n, int64_t groups,
            int64_t out, int64_t in, int64_t slice, int32_t format, int32_t threads) {
    const Matrix weight{static_cast<Format>(format), codes, scale, groups * out, in};
    for (int64_t first = 0; first < n; first += slice) {
        const int64_t rows = smaller(slice, n - first);
        pack_groups(weight.format, x + first * groups * in, panels, rows, groups, in, threads);
        multiply_groups(weight, panels, y + first * groups * out, rows, groups, threads);
    }
}

void linear_each(const float* x, const Stacked* stack, int64_t count, float* y, float* panels, int64_t n, int64_t in,
                 int64_t slice, int32_t threads) {
    int64_t elements = 0;
    for (int64_t i = 0; i < count; ++i) elements += stack[i].out * in;
    for (int64_t first = 0; first < n; first += slice) {
        const int64_t rows = smaller(slice, n - first);
        for (int64_t i = 0; i < count; ++i) {
            if (i > 0 && stack[i].panels == stack[i - 1].panels) continue;  // its format packed them already
            float* const own = panels + stack[i].panels * slice * padded(in);
            pack_groups(static_cast<Format>(stack[i].format), x + first * in, own, rows, 1, in, threads);
        }
        split_work(rows * elements, threads, [=](const Share& share) {
            float* to = y;
            for (int64_t i = 0; i < count; to += n * stack[i++].out) {
                const Stacked& part = stack[i];
                const Matrix weight{static_cast<Format>(part.format), part.codes, part.scale, part.out, in};
                const Product product{weight, panels + part.panels * slice * padded(in), rows, 0, rows,
                                      to + first * part.out, part.out, nullptr, 0, false};
                const int64_t units = quads(part.out);
                multiply(product, first_of(share, units) * kQuad, smaller(last_of(share, units) * kQuad, part.out));
            }
        });
    }
}

}  // namespace tenfold::TENFOLD_ISA
