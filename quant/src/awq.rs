//! AWQ (Lin et al. 2023, arXiv 2306.00978): channels that carry large activations are scaled up before rounding, so that
//! they are rounded more finely. The factors are powers of the mean magnitudes; the exponent is searched for each group of
//! layers that read the same input.
use crate::rounded::{SAMPLE, round_to_nearest, sampled, scale_columns};
use graphs::interpret::multiply;
use graphs::{DType, Format};
use rayon::prelude::*;

/// Exponents that are tried: 0 (no scaling), then in steps of 1 / 20.
const EXPONENTS: usize = 20;

/// Blocks by which all exponents are compared, and how many of the best are compared by more, beside no scaling.
const FIRST: usize = 4;
const KEPT: usize = 5;

/// The smallest factor before they are centered.
const LEAST: f32 = 1e-4;

/// One of the layers that share an input.
pub struct Matrix<'m> {
    /// `[out, in]`
    pub weights: &'m [f32],
    pub format: Format,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Scaling {
    /// By input channel: weights are multiplied by them, inputs divided.
    pub factors: Vec<f32>,
    pub exponent: f32,
    /// Sum of squares of what all layers' outputs are off, with the factors and without.
    pub loss: f64,
    pub plain_loss: f64,
}

/// The factors of one exponent: powers of the mean magnitudes, centered so that the largest times the smallest is 1.
pub fn factors(means: &[f32], exponent: f32) -> Vec<f32> {
    let mut factors: Vec<f32> = means.iter().map(|mean| mean.powf(exponent).max(LEAST)).collect();
    let most = factors.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
    let least = factors.iter().copied().fold(f32::INFINITY, f32::min);
    let center = (most * least).sqrt();
    factors.iter_mut().for_each(|factor| *factor /= center);
    factors
}

/// The exponent that loses least on `rows` `[.., in]`; the smallest of equals. `means` may be of fewer channels than the
/// layers read: `spread` makes factors of inputs of them.
pub fn search(
    matrices: &[Matrix<'_>],
    rows: &[f32],
    means: &[f32],
    spread: &(dyn Fn(Vec<f32>) -> Vec<f32> + Sync),
    compute: DType,
) -> Scaling {
    let try_one = |step: usize, blocks: usize| {
        let exponent = step as f32 / EXPONENTS as f32;
        let own = factors(means, exponent);
        let wide = spread(own.clone());
        let loss: f64 = matrices.iter().map(|matrix| loss_by(matrix, rows, &wide, compute, blocks)).sum();
        Scaling { factors: own, exponent, loss, plain_loss: 0.0 }
    };
    let first: Vec<f64> = (0..EXPONENTS).into_par_iter().map(|step| try_one(step, FIRST).loss).collect();
    let mut steps: Vec<usize> = (0..EXPONENTS).collect();
    steps[1..].sort_by(|a, b| first[*a].total_cmp(&first[*b]));
    steps.truncate(1 + KEPT);
    steps.sort_unstable();
    let tried: Vec<Scaling> = steps.into_par_iter().map(|step| try_one(step, SAMPLE)).collect();
    let plain_loss = tried.first().map_or(0.0, |plain| plain.loss);
    let none = Scaling { factors: vec![1.0; means.len()], exponent: 0.0, loss: f64::INFINITY, plain_loss };
    let best = tried.into_iter().fold(none, |best, other| if other.loss < best.loss { other } else { best });
    Scaling { plain_loss, ..best }
}

/// Sum of squares of X (W - W')^T for W' = round(W s) / s; of very many outputs an estimate by some of them.
pub fn loss(matrix: &Matrix<'_>, rows: &[f32], factors: &[f32], compute: DType) -> f64 {
    loss_by(matrix, rows, factors, compute, SAMPLE)
}

fn loss_by(matrix: &Matrix<'_>, rows: &[f32], factors: &[f32], compute: DType, blocks: usize) -> f64 {
    let input = factors.len().max(1);
    let count = rows.len() / input;
    let of_block = |weights: &[f32]| -> f64 {
        let mut off = weights.to_vec();
        scale_columns(&mut off, factors, |value, factor| value * factor);
        round_to_nearest(&mut off, input, matrix.format, compute);
        scale_columns(&mut off, factors, |value, factor| value / factor);
        std::iter::zip(&mut off, weights).for_each(|(off, value)| *off -= value);
        let products = multiply(rows, &off, [count, input, off.len() / input], true, false);
        products.iter().map(|value| f64::from(value * value)).sum()
    };
    let (blocks, times) = sampled(matrix.weights, input, blocks);
    blocks.into_iter().map(of_block).sum::<f64>() * times
}
