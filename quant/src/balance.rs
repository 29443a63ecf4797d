//! Factors for SmoothQuant by what rounding is expected to cost, channel by channel, where one exponent for all channels
//! (the paper's alpha) weighs only their largest magnitudes.
//!
//! Rounding to steps of `d` is off by `d^2 / 12` in the mean square, so with factors `s` the products of inputs `x` and
//! weights `w` are off by about
//!
//! `A B + C D`, `A = sum_t max_c (x_tc / s_c)^2`, `B = sum_c s_c^2 sum_o w_oc^2`, `C = sum_o max_c (s_c w_oc)^2`,
//! `D = sum_c sum_t x_tc^2 / s_c^2`
//!
//! over `12 * 127^2`. That is convex in the logarithms of the factors: where what pushes a factor up equals what pushes it
//! down for each channel, it is least.
use crate::Smoothed;
use crate::rounded::BLOCK;
use rayon::prelude::*;

/// Steps towards the balance; the last are the smallest.
const STEPS: usize = 60;

/// Part of the way (of the logarithm) that the first and the last step go.
const FIRST: f32 = 0.25;
const LAST: f32 = 0.02;

/// What squared largest values add up to, and what each channel has of it.
struct Peaks {
    sum: f64,
    of: Vec<f64>,
}

impl Smoothed<'_> {
    /// Starts with the factors `own`, of channels that may be fewer than are read: `spread` makes factors of inputs of them
    /// and `join` the mean of what belongs to each.
    pub fn balance(
        &self,
        own: Vec<f32>,
        spread: &dyn Fn(&[f32]) -> Vec<f32>,
        join: &dyn Fn(&[f32]) -> Vec<f32>,
    ) -> Vec<f32> {
        let width = self.absmax.len();
        let tokens = self.rows.len() / width.max(1);
        let (inputs, weights) = (squares(&[self.rows], width), squares(self.matrices, width));
        let mut factors = own;
        let mut best = (f64::INFINITY, factors.clone());
        for step in 0..=STEPS {
            let wide = spread(&factors);
            let inverse: Vec<f32> = wide.iter().map(|factor| 1.0 / factor).collect();
            let a = match self.per_token {
                true => peaks(&[self.rows], &inverse),
                false => peaks(&[self.absmax], &inverse).times(tokens as f64),
            };
            let c = peaks(self.matrices, &wide);
            let b: Vec<f64> = std::iter::zip(&weights, &wide).map(|(w, s)| w * f64::from(s * s)).collect();
            let d: Vec<f64> = std::iter::zip(&inputs, &inverse).map(|(x, s)| x * f64::from(s * s)).collect();
            let (all_b, all_d) = (b.iter().sum::<f64>(), d.iter().sum::<f64>());
            let cost = a.sum * all_b + c.sum * all_d;
            if cost < best.0 {
                best = (cost, factors.clone());
            }
            if step == STEPS {
                break;
            }
            let part = FIRST * (LAST / FIRST).powf(step as f32 / STEPS as f32);
            let over = |x: f64| (x / cost.max(f64::MIN_POSITIVE)) as f32;
            let up: Vec<f32> = (0..width).map(|at| over(a.of[at] * all_b + c.sum * d[at])).collect();
            let down: Vec<f32> = (0..width).map(|at| over(a.sum * b[at] + c.of[at] * all_d)).collect();
            for (factor, (up, down)) in std::iter::zip(&mut factors, std::iter::zip(join(&up), join(&down))) {
                if up > 0.0 && down > 0.0 {
                    *factor = crate::smooth::bounded(*factor * (up / down).powf(part));
                }
            }
        }
        best.1
    }
}

impl Peaks {
    fn times(mut self, count: f64) -> Peaks {
        self.sum *= count;
        self.of.iter_mut().for_each(|of| *of *= count);
        self
    }
}

/// Sums of squares of each column, block by block, in their order.
fn squares(matrices: &[&[f32]], width: usize) -> Vec<f64> {
    let of_block = |block: &[f32]| {
        let mut sums = vec![0.0; width];
        for row in block.chunks_exact(width.max(1)) {
            std::iter::zip(&mut sums, row).for_each(|(sum, value)| *sum += f64::from(value * value));
        }
        sums
    };
    let mut sums = vec![0.0; width];
    for matrix in matrices {
        let blocks: Vec<Vec<f64>> = matrix.par_chunks((BLOCK * width).max(1)).map(of_block).collect();
        for block in blocks {
            std::iter::zip(&mut sums, block).for_each(|(sum, own)| *sum += own);
        }
    }
    sums
}

/// Values of a row whose largest is found at once; where it lies is looked for in the best run only, which takes half the time.
const RUN: usize = 64;

/// Of each row, each value times its column's factor.
fn peaks(matrices: &[&[f32]], factors: &[f32]) -> Peaks {
    let scaled = |(value, factor): (&f32, &f32)| (value * factor).abs();
    let peak = |row: &[f32]| {
        let (mut first, mut most) = (0, 0.0f32);
        for (run, (values, factors)) in row.chunks(RUN).zip(factors.chunks(RUN)).enumerate() {
            let own = values
                .iter()
                .zip(factors)
                .map(scaled)
                .fold(0.0f32, |most, value| if value > most { value } else { most });
            if own > most {
                (first, most) = (run * RUN, own);
            }
        }
        let at = row[first..].iter().zip(&factors[first..]).position(|pair| scaled(pair) == most);
        (at.map(|at| first + at), f64::from(most) * f64::from(most))
    };
    let mut peaks = Peaks { sum: 0.0, of: vec![0.0; factors.len()] };
    for matrix in matrices {
        let found: Vec<(Option<usize>, f64)> = matrix.par_chunks_exact(factors.len().max(1)).map(peak).collect();
        for (at, square) in found {
            peaks.sum += square;
            at.into_iter().for_each(|at| peaks.of[at] += square);
        }
    }
    peaks
}
