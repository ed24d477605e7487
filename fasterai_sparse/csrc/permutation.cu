// Kernels of the permutation search and of ASP's four functions (nbs/nm/01_search_cuda). NVRTC compiles them at first
// use. It has no standard headers, so this file includes none. The interface is C. Matrices are stored row by row.
// Each kernel has a twin in torch or numpy that specifies it. No kernel adds with atomics, so the same input gives the
// same bits on every run.

// `parts[z][i][j]` = sum of |h[i,r] - x[j,r]| over the `step` columns r from z·step on, for h (a×k) and x (b×k).
// With max(a,b) = (a+b+|a-b|)/2 the caller gets sums of maxima from it: sums of h and of x are easy to compute, and
// |a-b| takes two additions at full rate, while Hopper computes the maximum of two floats at half rate.
// A block has 128 threads, arranged 8×16, each with TI×TJ sums. After every DEPTH columns these sums are added to a
// second set, which keeps rounding errors small for large k.
template<int TI, int TJ> __device__ void add_distances(
    const float* __restrict__ h, const float* __restrict__ x, float* __restrict__ parts, int a, int b, int k, int step
) {
    constexpr int DEPTH = 16, BI = 8*TI, BJ = 16*TJ;
    __shared__ __align__(16) float hs[DEPTH][BI+4], xs[DEPTH][BJ+4];
    // A thread computes the columns tj … tj+3, 64+tj … 64+tj+3, and so on, which avoids bank conflicts
    const int t = threadIdx.x, ti = t/16*TI, tj = t%16*4;
    const int i0 = blockIdx.y*BI, j0 = blockIdx.x*BJ, to = min((long long)k, (blockIdx.z+1LL)*step);
    float sum[TI][TJ] = {};
    for (int r0 = blockIdx.z*step; r0 < to; r0 += DEPTH) {
        const int r = r0 + t%DEPTH;
        for (int i = t/DEPTH; i < BI; i += 128/DEPTH) {
            hs[t%DEPTH][i] = r < to && i0+i < a ? h[(i0+i)*(long long)k + r] : 0;
        }
        for (int j = t/DEPTH; j < BJ; j += 128/DEPTH) {
            xs[t%DEPTH][j] = r < to && j0+j < b ? x[(j0+j)*(long long)k + r] : 0;
        }
        __syncthreads();
        float part[TI][TJ] = {};
        #pragma unroll 4
        for (int d = 0; d < DEPTH; d++) {
            float p[TI], q[TJ];
            #pragma unroll
            for (int i = 0; i < TI; i++) p[i] = hs[d][ti+i];
            #pragma unroll
            for (int j = 0; j < TJ; j++) q[j] = xs[d][j/4*64 + tj + j%4];
            #pragma unroll
            for (int i = 0; i < TI; i++)
                #pragma unroll
                for (int j = 0; j < TJ; j++) part[i][j] += fabsf(p[i]-q[j]);
        }
        #pragma unroll
        for (int i = 0; i < TI; i++)
            #pragma unroll
            for (int j = 0; j < TJ; j++) sum[i][j] += part[i][j];
        __syncthreads();
    }
    parts += blockIdx.z*(long long)a*b;
    #pragma unroll
    for (int i = 0; i < TI; i++)
        #pragma unroll
        for (int j = 0; j < TJ; j++) {
            const int row = i0 + ti + i, col = j0 + j/4*64 + tj + j%4;
            if (row < a && col < b) parts[row*(long long)b + col] = sum[i][j];
        }
}

extern "C" __global__ void __launch_bounds__(128) distances_64x128(
    const float* h, const float* x, float* parts, int a, int b, int k, int step
) {
    add_distances<8,8>(h, x, parts, a, b, k, step);
}

extern "C" __global__ void __launch_bounds__(128) distances_8x64(
    const float* h, const float* x, float* parts, int a, int b, int k, int step
) {
    add_distances<1,4>(h, x, parts, a, b, k, step);
}

// out[at[i]][j] = (parts[0][i][j] + … + parts[n-1][i][j])/2 + u[i] + v[j]
extern "C" __global__ void add_parts(
    const float* __restrict__ parts, int n, int a, int b, const float* u, const float* v, const long long* at,
    float* out
) {
    const int j = blockIdx.x*blockDim.x + threadIdx.x;
    if (j >= b) return;
    for (int i = blockIdx.y; i < a; i += gridDim.y) {
        float sum = 0;
        for (int z = 0; z < n; z++) sum += parts[((long long)z*a + i)*b + j];
        out[at[i]*b + j] = .5f*sum + u[i] + v[j];
    }
}

// The sum of `v` over the threads of a block. Only the block's first thread may use the result
__device__ double block_sum(double v) {
    __shared__ double all[1024];
    all[threadIdx.x] = v;
    for (int n = blockDim.x; n > 1; n = (n+1)/2) {
        __syncthreads();
        if (threadIdx.x < n/2) all[threadIdx.x] += all[threadIdx.x + (n+1)/2];
    }
    v = all[0];
    __syncthreads();
    return v;
}

// What n:m keeps of a stripe of m columns if its column at the place `at[.]` is exchanged for another one. Without that
// column each row r of the stripe has m-1 values. The n-1 largest of them are kept whichever column comes in. The nth
// largest, in_hole[.,r], is kept only if the new column's value is not larger.
// `base` = sum over the rows of the n-1 largest values and half of in_hole; `kept` = sum that n:m keeps of the stripe
// as it is. One block for each place.
extern "C" __global__ void holes(
    const float* __restrict__ columns, const long long* order, const long long* at, int rows, int n, int m,
    float* in_hole, float* base, float* kept
) {
    const int hole = at[blockIdx.x]%m;
    order += at[blockIdx.x]-hole;
    double sum = 0, whole = 0;
    for (int r = threadIdx.x; r < rows; r += blockDim.x) {
        float most = 0, nth = 0;
        for (int i = 0; i < m; i++) if (i != hole) {
            const float v = columns[order[i]*rows + r];
            int rank = 0;
            for (int j = 0; j < m; j++) if (j != hole && j != i) {
                const float w = columns[order[j]*rows + r];
                rank += w > v || (w == v && j < i);
            }
            if (rank < n-1) most += v;
            if (rank == n-1) nth = v;
        }
        in_hole[blockIdx.x*(long long)rows + r] = nth;
        sum += most + .5f*nth;
        whole += most + fmaxf(nth, columns[order[hole]*rows + r]);
    }
    sum = block_sum(sum);
    whole = block_sum(whole);
    if (threadIdx.x) return;
    base[blockIdx.x] = sum;
    kept[blockIdx.x] = whole;
}

// For each of `stripes` and each stripe of the matrix: what the two keep after the best swap of one column between them
// (`best`), and that swap as m·i + j, where i and j are the places of the two columns in their stripes (`which`)
extern "C" __global__ void swaps(
    const float* __restrict__ values, const long long* __restrict__ order, const long long* stripes, int n_stripes,
    int c, int m, float* best, int* which
) {
    const int other = blockIdx.x*blockDim.x + threadIdx.x, g = c/m;
    if (other >= g) return;
    for (int s = blockIdx.y; s < n_stripes; s += gridDim.y) {
        const long long here = stripes[s]*m, there = (long long)other*m;
        float most = -3e38f;
        int swap = 0;
        for (int i = 0; i < m; i++) for (int j = 0; j < m; j++) {
            const float v = values[(here+i)*c + order[there+j]] + values[(there+j)*c + order[here+i]];
            if (v > most) most = v, swap = m*i + j;
        }
        best[(long long)s*g + other] = most;
        which[(long long)s*g + other] = swap;
    }
}

// The sum of the two largest magnitudes of four
__device__ float two_of_four(float a, float b, float c, float d) {
    a = fabsf(a), b = fabsf(b), c = fabsf(c), d = fabsf(d);
    return fmaxf(fmaxf(a+b, c+d), fmaxf(a, b) + fmaxf(c, d));
}

// kept[g][p] = sum of the magnitudes that 2:4 keeps in the `width` stripes of group g after their 4·width columns have
// been put in the order of permutation p. One block for each group and each blockDim.x permutations
extern "C" __global__ void deals(
    const float* __restrict__ mat, int rows, int cols, const unsigned* __restrict__ groups, int width,
    const unsigned* __restrict__ perms, int n_perms, double* kept
) {
    const int p = blockIdx.y*blockDim.x + threadIdx.x;
    if (p >= n_perms) return;
    groups += blockIdx.x*(long long)width;
    perms += p*4LL*width;
    double sum = 0;
    for (int s = 0; s < width; s++) {
        const float* from[4];
        for (int i = 0; i < 4; i++) from[i] = mat + groups[perms[4*s+i]/4]*4 + perms[4*s+i]%4;
        for (int r0 = 0; r0 < rows; r0 += 64) {   // in float within 64 rows: some devices add doubles slowly
            float part = 0;
            for (long long r = r0; r < min(rows, r0+64); r++) {
                part += two_of_four(from[0][r*cols], from[1][r*cols], from[2][r*cols], from[3][r*cols]);
            }
            sum += part;
        }
    }
    kept[blockIdx.x*(long long)n_perms + p] = sum;
}

// kept[.] = each block's part of the sum of magnitudes that 2:4 keeps in the columns from `start` to `end`
extern "C" __global__ void two_to_four(
    const float* __restrict__ mat, int rows, int cols, int start, int end, double* kept
) {
    const long long stripes = (end-start)/4, all = stripes*rows, threads = (long long)gridDim.x*blockDim.x;
    double sum = 0;
    for (long long e = blockIdx.x*(long long)blockDim.x + threadIdx.x; e < all; e += threads) {
        const float* x = mat + e/stripes*cols + start + e%stripes*4;
        sum += two_of_four(x[0], x[1], x[2], x[3]);
    }
    sum = block_sum(sum);
    if (!threadIdx.x) kept[blockIdx.x] = sum;
}
