// 3x3 convolutions of stride 1 and padding 1 by Winograd's algorithm F(4x4, 3x3): A. Lavin and S. Gray, Fast Algorithms
// for Convolutional Neural Networks, CVPR 2016.
//
// A tile of 4x4 outputs is A^T [sum over channels of (G w G^T) * (B^T x B)] A, where x is the 6x6 inputs that the tile
// depends on. This is one matrix product over the channels at each of 36 points: 36 multiplications instead of 144.
//
// Images are [N, H, W, channels], weights are [outputs, 3, 3, inputs], both float32. Channels are in panels of 16:
//   points of a block of tiles  [36][channels / 16][block][16]
//   points of a weight          [36][outputs / 16][inputs][16]
// Each of the 36 planes of a block is followed by 16 unused numbers, so that planes do not compete for the same lines
// of the cache.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#ifdef __AVX__
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
typedef float Vector __attribute__((vector_size(BYTES)));

using Size = std::int64_t;
constexpr int LANES = BYTES / sizeof(float), PANEL = 16, VECTORS = PANEL / LANES, POINTS = 36;
constexpr Size ROWS = 4;  // rows of a matrix product that are held in registers

Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, BYTES);
  return value;
}

void store(Vector value, float* to) { std::memcpy(to, &value, BYTES); }

// One-dimensional transforms. Each is the product with the matrix named beside it.

struct InputPoints {  // B^T
  static void apply(const Vector x[6], Vector out[6]) {
    const Vector even = x[4] - 4.f * x[2], odd = x[3] - 4.f * x[1];
    const Vector far_even = x[4] - x[2], far_odd = 2.f * (x[3] - x[1]);
    out[0] = 4.f * x[0] - 5.f * x[2] + x[4];
    out[1] = even + odd;
    out[2] = even - odd;
    out[3] = far_even + far_odd;
    out[4] = far_even - far_odd;
    out[5] = 4.f * x[1] - 5.f * x[3] + x[5];
  }
};

struct Outputs {  // A^T
  static void apply(const Vector m[6], Vector out[4]) {
    const Vector sum = m[1] + m[2], difference = m[1] - m[2], far_sum = m[3] + m[4], far_difference = m[3] - m[4];
    out[0] = m[0] + sum + far_sum;
    out[1] = difference + 2.f * far_difference;
    out[2] = sum + 4.f * far_sum;
    out[3] = difference + 8.f * far_difference + m[5];
  }
};

struct GradientPoints {  // A
  static void apply(const Vector y[4], Vector out[6]) {
    const Vector even = y[0] + y[2], odd = y[1] + y[3];
    const Vector far_even = y[0] + 4.f * y[2], far_odd = 2.f * y[1] + 8.f * y[3];
    out[0] = y[0];
    out[1] = even + odd;
    out[2] = even - odd;
    out[3] = far_even + far_odd;
    out[4] = far_even - far_odd;
    out[5] = y[3];
  }
};

struct WeightPoints {  // G
  static void apply(const Vector w[3], Vector out[6]) {
    const Vector even = (w[0] + w[2]) / 6.f, odd = w[1] / 6.f;
    const Vector far_even = w[0] / 24.f + w[2] / 6.f, far_odd = w[1] / 12.f;
    out[0] = w[0] / 4.f;
    out[1] = -even - odd;
    out[2] = odd - even;
    out[3] = far_even + far_odd;
    out[4] = far_even - far_odd;
    out[5] = w[2];
  }
};

struct WeightGradient {  // G^T
  static void apply(const Vector u[6], Vector out[3]) {
    const Vector sum = (u[1] + u[2]) / 6.f, far_sum = u[3] + u[4];
    out[0] = u[0] / 4.f - sum + far_sum / 24.f;
    out[1] = (u[2] - u[1]) / 6.f + (u[3] - u[4]) / 12.f;
    out[2] = far_sum / 6.f - sum + u[5];
  }
};

// Apply a transform along the columns, then along the rows.
template <typename Transform, int IN, int OUT>
void both_ways(const Vector in[IN][IN], Vector out[OUT][OUT]) {
  Vector half[OUT][IN];
#pragma GCC unroll 6
  for (int column = 0; column < IN; ++column) {
    Vector from[IN], to[OUT];
#pragma GCC unroll 6
    for (int row = 0; row < IN; ++row) from[row] = in[row][column];
    Transform::apply(from, to);
#pragma GCC unroll 6
    for (int row = 0; row < OUT; ++row) half[row][column] = to[row];
  }
#pragma GCC unroll 6
  for (int row = 0; row < OUT; ++row) Transform::apply(half[row], out[row]);
}

// Tiles

// Divide and round up.
Size over(Size value, Size step) { return (value + step - 1) / step; }

struct Images {
  Size count, height, width;
  Size down() const { return over(height, 4); }
  Size across() const { return over(width, 4); }
  Size tiles() const { return count * down() * across(); }
};

struct Corner {  // the image, row and column of a tile's first output
  Size image, row, column;
  Corner(const Images& images, Size tile)
      : image(tile / (images.down() * images.across())),
        row(4 * (tile / images.across() % images.down())),
        column(4 * (tile % images.across())) {}
};

Size offset(const Images& images, Size image, Size row, Size column) {
  return (image * images.height + row) * images.width + column;
}

bool inside(const Images& images, Size row, Size column) {
  return row >= 0 && row < images.height && column >= 0 && column < images.width;
}

Size plane(Size channels, Size block) { return channels * block + PANEL; }

float* panel_row(float* points, Size channel, Size block, Size tile) {
  return points + (channel / PANEL * block + tile) * PANEL + channel % PANEL;
}

// Compute the points of `count` tiles, beginning with tile `first`. A tile reads SIDE x SIDE pixels, beginning BEFORE
// pixels before its corner in both directions. Pixels outside of the image are zero.
template <typename Transform, int SIDE, int BEFORE>
void to_points(const float* pixels, const Images& images, Size channels, Size first, Size count, Size block,
               const float* zeros, float* points) {
  const Size apart = plane(channels, block);
  for (Size tile = 0; tile < count; ++tile) {
    const Corner corner(images, first + tile);
    const float* from[SIDE][SIDE];
    for (int i = 0; i < SIDE; ++i)
      for (int j = 0; j < SIDE; ++j) {
        const Size row = corner.row + i - BEFORE, column = corner.column + j - BEFORE;
        from[i][j] = inside(images, row, column)
                         ? pixels + offset(images, corner.image, row, column) * channels : zeros;
      }
    for (Size channel = 0; channel < channels; channel += LANES) {
      Vector in[SIDE][SIDE], out[6][6];
#pragma GCC unroll 6
      for (int i = 0; i < SIDE; ++i)
#pragma GCC unroll 6
        for (int j = 0; j < SIDE; ++j) in[i][j] = load(from[i][j] + channel);
      both_ways<Transform, SIDE, 6>(in, out);
      float* to = panel_row(points, channel, block, tile);
#pragma GCC unroll 36
      for (int point = 0; point < POINTS; ++point) store(out[point / 6][point % 6], to + point * apart);
    }
  }
}

// Compute the pixels of `count` tiles from their points, and add the bias, which may be null.
void to_images(float* points, const Images& images, Size channels, Size first, Size count, Size block,
               const float* bias, float* pixels) {
  const Size apart = plane(channels, block);
  for (Size tile = 0; tile < count; ++tile) {
    const Corner corner(images, first + tile);
    const Size rows = std::min<Size>(4, images.height - corner.row);
    const Size columns = std::min<Size>(4, images.width - corner.column);
    float* to = pixels + offset(images, corner.image, corner.row, corner.column) * channels;
    for (Size channel = 0; channel < channels; channel += LANES) {
      const float* from = panel_row(points, channel, block, tile);
      Vector in[6][6], out[4][4];
#pragma GCC unroll 36
      for (int point = 0; point < POINTS; ++point) in[point / 6][point % 6] = load(from + point * apart);
      both_ways<Outputs, 6, 4>(in, out);
      const Vector added = bias ? load(bias + channel) : Vector{};
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) store(out[i][j] + added, to + (i * images.width + j) * channels + channel);
    }
  }
}

// Compute out[row][16] = sum over i of left(row, i) right[i][16] for ROWS rows, where i runs through `outer` times
// `inner` values. With ADD, add the sum to out.
template <bool ADD>
void product(const float* left, Size between_rows, Size between_inner, Size between_outer, Size outer, Size inner,
             const float* right, float* out) {
  Vector sums[ROWS][VECTORS];
#pragma GCC unroll 4
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[row][v] = ADD ? load(out + row * PANEL + v * LANES) : Vector{};
  for (Size o = 0; o < outer; ++o, left += between_outer) {
    const float* value = left;
    for (Size i = 0; i < inner; ++i, value += between_inner, right += PANEL) {
      Vector factors[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) factors[v] = load(right + v * LANES);
#pragma GCC unroll 4
      for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums[row][v] += value[row * between_rows] * factors[v];
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(sums[row][v], out + row * PANEL + v * LANES);
}

// Maximum number of tiles in a block: FEW for the convolution, MANY for the weight's gradient. Larger blocks need fewer
// passes over the sums of the gradient.
constexpr Size FEW = 32, MANY = 64;

// Tiles in blocks of `size`, which is at most `most`. The blocks are divided into `shares` of equal size, one for each
// thread that gets enough work. Each share holds its own sums of a weight's gradient. Threads without a share stay in
// the OpenMP team: a thread that leaves the team ends, and is started again for the next layer.
struct Blocks {
  Size tiles, shares, size;
  Blocks(const Images& images, Size most, Size threads)
      : tiles(images.tiles()), shares(std::min(threads, over(tiles, FEW))) {
    const Size blocks = over(over(tiles, most), shares) * shares;
    size = over(over(tiles, blocks), ROWS) * ROWS;
  }
  Size first(Size share) const { return share * over(tiles, size) / shares; }  // first block of a share
};

// Offset of the row of 16 outputs for one input, in the points of a weight.
Size weight_row(Size point, Size panels, Size panel, Size inputs, Size input) {
  return ((point * panels + panel) * inputs + input) * PANEL;
}

}  // namespace

extern "C" {

// Number of floats in the working memory of `convolve` and `weight_gradient`.
Size convolve_work(Size count, Size height, Size width, Size inputs, Size outputs, Size threads) {
  const Blocks blocks(Images{count, height, width}, FEW, threads);
  return blocks.shares * POINTS * (plane(inputs, blocks.size) + plane(outputs, blocks.size));
}

Size weight_gradient_work(Size count, Size height, Size width, Size inputs, Size outputs, Size threads) {
  const Blocks blocks(Images{count, height, width}, MANY, threads);
  return blocks.shares * POINTS * (plane(inputs, blocks.size) + plane(outputs, blocks.size) + inputs * outputs);
}

// Compute the points of a weight. With `turned`, compute those of the weight of the input's gradient: kernels are
// rotated by 180 degrees, and inputs and outputs change places.
void weight_points(const float* weight, Size inputs, Size outputs, Size turned, Size threads, float* points) {
  const Size from = turned ? outputs : inputs, to = turned ? inputs : outputs;
#pragma omp parallel for num_threads(threads) collapse(2)
  for (Size panel = 0; panel < to / PANEL; ++panel)
    for (Size channel = 0; channel < from; ++channel)
      for (int v = 0; v < VECTORS; ++v) {
        Vector in[3][3], out[6][6];
        for (int tap = 0; tap < 9; ++tap)
          for (int lane = 0; lane < LANES; ++lane) {
            const Size other = panel * PANEL + v * LANES + lane;
            const Size place = turned ? (channel * 9 + 8 - tap) * inputs + other : (other * 9 + tap) * inputs + channel;
            in[tap / 3][tap % 3][lane] = weight[place];
          }
        both_ways<WeightPoints, 3, 6>(in, out);
        for (int point = 0; point < POINTS; ++point)
          store(out[point / 6][point % 6], points + weight_row(point, to / PANEL, panel, from, channel) + v * LANES);
      }
}

// Compute the convolution. `weights` are the weight's points, `bias` is [outputs] or null.
void convolve(const float* input, Size count, Size height, Size width, Size inputs, const float* weights,
              const float* bias, Size outputs, Size threads, float* work, float* output) {
  const Images images{count, height, width};
  const Blocks blocks(images, FEW, threads);
  const Size block = blocks.size;
  const Size seen = plane(inputs, block), made = plane(outputs, block), panels = outputs / PANEL;
  const std::vector<float> zeros(inputs);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (Size share = 0; share < blocks.shares; ++share) {
    float* left = work + share * POINTS * (seen + made);
    float* products = left + POINTS * seen;
    for (Size number = blocks.first(share); number < blocks.first(share + 1); ++number) {
      const Size first = number * block, tiles_now = std::min(block, blocks.tiles - first);
      to_points<InputPoints, 6, 1>(input, images, inputs, first, tiles_now, block, zeros.data(), left);
      for (Size point = 0; point < POINTS; ++point)
        for (Size panel = 0; panel < panels; ++panel)
          for (Size row = 0; row < tiles_now; row += ROWS)
            product<false>(panel_row(left + point * seen, 0, block, row), PANEL, 1, block * PANEL, inputs / PANEL,
                           PANEL, weights + weight_row(point, panels, panel, inputs, 0),
                           panel_row(products + point * made, panel * PANEL, block, row));
      to_images(products, images, outputs, first, tiles_now, block, bias, output);
    }
  }
}

// Compute the weight's gradient [outputs, 3, 3, inputs] from the input and the output's gradient.
void weight_gradient(const float* input, const float* output_gradient, Size count, Size height, Size width,
                     Size inputs, Size outputs, Size threads, float* work, float* gradient) {
  const Images images{count, height, width};
  const Blocks blocks(images, MANY, threads);
  const Size block = blocks.size;
  const Size seen = plane(inputs, block), sent = plane(outputs, block), panels = outputs / PANEL;
  const Size sum = POINTS * inputs * outputs;
  float* sums = work + blocks.shares * POINTS * (seen + sent);
  const std::vector<float> zeros(std::max(inputs, outputs));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (Size share = 0; share < blocks.shares; ++share) {
    float* left = work + share * POINTS * (seen + sent);
    float* right = left + POINTS * seen;
    float* out = sums + share * sum;
    std::fill(out, out + sum, 0.f);
    for (Size number = blocks.first(share); number < blocks.first(share + 1); ++number) {
      const Size first = number * block, tiles_now = std::min(block, blocks.tiles - first);
      to_points<InputPoints, 6, 1>(input, images, inputs, first, tiles_now, block, zeros.data(), left);
      to_points<GradientPoints, 4, 0>(output_gradient, images, outputs, first, tiles_now, block, zeros.data(), right);
      for (Size point = 0; point < POINTS; ++point)
        for (Size panel = 0; panel < panels; ++panel)
          for (Size channel = 0; channel < inputs; channel += ROWS)
            product<true>(panel_row(left + point * seen, channel, block, 0), 1, PANEL, 0, 1, tiles_now,
                          panel_row(right + point * sent, panel * PANEL, block, 0),
                          out + weight_row(point, panels, panel, inputs, channel));
    }
  }
#pragma omp parallel for num_threads(threads) collapse(2)
  for (Size panel = 0; panel < panels; ++panel)
    for (Size channel = 0; channel < inputs; ++channel)
      for (int v = 0; v < VECTORS; ++v) {
        Vector in[6][6], out[3][3];
        for (int point = 0; point < POINTS; ++point) {
          const float* from = sums + weight_row(point, panels, panel, inputs, channel) + v * LANES;
          Vector total = load(from);
          for (Size share = 1; share < blocks.shares; ++share) total += load(from + share * sum);
          in[point / 6][point % 6] = total;
        }
        both_ways<WeightGradient, 6, 3>(in, out);
        for (int tap = 0; tap < 9; ++tap)
          for (int lane = 0; lane < LANES; ++lane)
            gradient[((panel * PANEL + v * LANES + lane) * 9 + tap) * inputs + channel] = out[tap / 3][tap % 3][lane];
      }
}

}  // extern "C"
