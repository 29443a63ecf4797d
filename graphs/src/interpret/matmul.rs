//! Matrix products. The only unsafe code of this crate: the `gemm` crate takes pointers and strides.
use rayon::prelude::*;

/// `a [m, k]` times `b`, which is `[k, n]`, or `[n, k]` where `transposed`; result `[m, n]`, all row-major.
pub fn multiply(a: &[f32], b: &[f32], [m, k, n]: [usize; 3], transposed: bool, parallel: bool) -> Vec<f32> {
    assert_eq!(a.len(), m * k, "left operand");
    assert_eq!(b.len(), k * n, "right operand");
    let mut c = vec![0.0f32; m * n];
    if m == 1 && transposed {
        // One token: bound by reading the matrix, where plain dot products are faster than gemm.
        let threads = if parallel { n.div_ceil(64).max(1) } else { n.max(1) };
        let rows = n.div_ceil(threads.min(64)).max(1);
        let job = |(block, c): (usize, &mut [f32])| {
            for (row, c) in c.iter_mut().enumerate() {
                let start = (block * rows + row) * k;
                *c = dot(a, &b[start..start + k]);
            }
        };
        if parallel {
            c.par_chunks_mut(rows).enumerate().for_each(job);
        } else {
            c.chunks_mut(rows).enumerate().for_each(job);
        }
        return c;
    }
    let (column, row) = if transposed { (k, 1) } else { (1, n) };
    let parallelism = if parallel { gemm::Parallelism::Rayon(0) } else { gemm::Parallelism::None };
    #[expect(unsafe_code, reason = "gemm's interface is pointers; the lengths were checked above")]
    // SAFETY: c is m*n, a is m*k and b is k*n elements long, and the strides stay inside those.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.as_ptr(),
            1,
            k as isize,
            b.as_ptr(),
            column as isize,
            row as isize,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
    }
    c
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let (a_lanes, b_lanes) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = std::iter::zip(a_lanes.remainder(), b_lanes.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in std::iter::zip(a_lanes, b_lanes) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_triple_loop() {
        for (m, k, n) in [(1, 37, 130), (3, 16, 5), (7, 33, 9), (1, 4, 1)] {
            let value = |i: usize| ((i * 7919) % 101) as f32 / 50.0 - 1.0;
            let a: Vec<f32> = (0..m * k).map(value).collect();
            let b: Vec<f32> = (0..k * n).map(|i| value(i + 13)).collect();
            for transposed in [false, true] {
                let found = multiply(&a, &b, [m, k, n], transposed, true);
                for row in 0..m {
                    for column in 0..n {
                        let at = |i: usize| if transposed { b[column * k + i] } else { b[i * n + column] };
                        let wanted: f64 = (0..k).map(|i| f64::from(a[row * k + i]) * f64::from(at(i))).sum();
                        assert!((f64::from(found[row * n + column]) - wanted).abs() < 1e-4);
                    }
                }
            }
        }
    }
}
