//! SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): a factor for each input channel moves outliers of the activations,
//! which are divided by it, into the weights, which are multiplied.

use crate::rounded::{SAMPLE, round_to_nearest, sampled, scale_columns};
use graphs::interpret::{multiply, round_tokens};
use graphs::{DType, Format};
use rayon::prelude::*;

/// Shares of the difficulty that may move into the weights: from the paper's 0.5 for most models to beyond its 0.85 for
/// those with a few very large activations.
pub const ALPHAS: [f32; 10] = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95];

/// Bounds of a factor, before [`input_limit`].
const LEAST: f32 = 1e-4;
const MOST: f32 = 1e4;

/// What inputs may come to in float16, whose largest number is 65504, once they are divided: others than those seen may be
/// larger.
const INPUT_LIMIT: f32 = 8192.0;

/// How far a static range reaches beyond what was seen of smoothed inputs. Smoothing brings many channels close to the
/// largest, so that among new inputs some are clipped: with it the trained models diverge less by up to half (SmolLM2, whose
/// few huge inputs are always the same, by a twentieth more).
const ROOM: f32 = 1.15;

/// The largest magnitude of each input channel of a matrix `[out, in]`, joined with those in `most`.
pub fn join_column_absmax(weights: &[f32], most: &mut [f32]) {
    for row in weights.chunks_exact(most.len().max(1)) {
        for (most, value) in std::iter::zip(&mut *most, row) {
            *most = most.max(value.abs());
        }
    }
}

/// Factors by the largest magnitudes of each channel's activations and weights (equation 4); 1 where either has none.
pub fn smooth(activations: &[f32], weights: &[f32], alpha: f32) -> Vec<f32> {
    let factor = |(&activation, &weight): (&f32, &f32)| {
        if activation > 0.0 && weight > 0.0 { bounded(activation.powf(alpha) / weight.powf(1.0 - alpha)) } else { 1.0 }
    };
    std::iter::zip(activations, weights).map(factor).collect()
}

pub(crate) fn bounded(factor: f32) -> f32 {
    factor.clamp(LEAST, MOST)
}

/// What all factors have to be multiplied by, at least 1, so that inputs divided by them stay within float16; scales take the
/// rest. A power of two, which changes no rounding.
fn input_limit(absmax: &[f32], factors: &[f32]) -> f32 {
    let most = std::iter::zip(absmax, factors).fold(0.0f32, |most, (value, factor)| most.max(value / factor));
    if most > INPUT_LIMIT { (most / INPUT_LIMIT).log2().ceil().exp2() } else { 1.0 }
}

/// One scale for all channels: of the largest magnitude, with [`ROOM`] where factors smooth it; 1 where there is nothing.
pub fn activation_scale(activations: &[f32], factors: Option<&[f32]>) -> f32 {
    let factor = |channel: usize| factors.and_then(|factors| factors.get(channel)).copied().unwrap_or(1.0);
    let most = activations.iter().enumerate().fold(0.0f32, |most, (at, value)| most.max(value / factor(at)));
    let room = if factors.is_some() { ROOM } else { 1.0 };
    if most > 0.0 { most * room / 127.0 } else { 1.0 }
}

/// What is known of the layers that read one input.
pub struct Smoothed<'m> {
    /// Matrices `[out, in]`.
    pub matrices: &'m [&'m [f32]],
    /// Some inputs `[.., in]`.
    pub rows: &'m [f32],
    /// Largest magnitudes of all inputs, by channel.
    pub absmax: &'m [f32],
    pub per_token: bool,
}

impl<'m> Smoothed<'m> {
    /// Factors of the channels that are made, which may be fewer than are read: `alpha`'s, or those that lose least.
    /// `of_inputs` and `of_weights` are their largest magnitudes; `spread` makes factors of the channels read of them, and
    /// `join` the mean of what belongs to each.
    pub fn search(
        &self,
        alpha: Option<f32>,
        [of_inputs, of_weights]: [&[f32]; 2],
        spread: &dyn Fn(&[f32]) -> Vec<f32>,
        join: &dyn Fn(&[f32]) -> Vec<f32>,
        compute: DType,
    ) -> Vec<f32> {
        let by = |alpha| smooth(of_inputs, of_weights, alpha);
        let mut found = alpha.map_or_else(
            || {
                // Where inputs have no outliers it may be best to leave them alone.
                let mut candidates = vec![vec![1.0; of_inputs.len()]];
                candidates.extend(ALPHAS.map(by));
                let wanted = self.products();
                let wide: Vec<Vec<f32>> = candidates.iter().map(|own| spread(own)).collect();
                let (best, loss) = self.best_of(&wanted, &wide, compute);
                let best = candidates.swap_remove(best);
                let balanced = self.balance(best.clone(), spread, join);
                if self.off(&wanted, &spread(&balanced), compute) < loss { balanced } else { best }
            },
            by,
        );
        let all = input_limit(self.absmax, &spread(&found));
        found.iter_mut().for_each(|factor| *factor *= all);
        found
    }

    /// The candidate, factors of each channel, under which products of INT8 inputs and weights lose least, the first of
    /// equals; and what it loses.
    pub fn best(&self, candidates: &[Vec<f32>], compute: DType) -> (usize, f64) {
        self.best_of(&self.products(), candidates, compute)
    }

    fn best_of(&self, wanted: &[Vec<f32>], candidates: &[Vec<f32>], compute: DType) -> (usize, f64) {
        let losses: Vec<f64> = candidates.par_iter().map(|factors| self.off(wanted, factors, compute)).collect();
        let better = |best: usize, at: usize| if losses[at] < losses[best] { at } else { best };
        let best = (1..losses.len()).fold(0, better);
        (best, losses.get(best).copied().unwrap_or(0.0))
    }

    /// Sum of squares by which the products are off; of very many outputs an estimate by some of them.
    pub fn loss(&self, factors: &[f32], compute: DType) -> f64 {
        self.off(&self.products(), factors, compute)
    }

    /// Blocks of outputs of all matrices, and what the loss of each counts.
    fn blocks(&self) -> Vec<(&[f32], f64)> {
        let of = |matrix: &&'m [f32]| {
            let (blocks, times) = sampled(matrix, self.absmax.len(), SAMPLE);
            blocks.into_iter().map(move |block| (block, times))
        };
        self.matrices.iter().flat_map(of).collect()
    }

    /// Of each block, `[.., out]`.
    fn products(&self) -> Vec<Vec<f32>> {
        self.blocks().par_iter().map(|(block, _)| self.product(self.rows, block)).collect()
    }

    fn product(&self, inputs: &[f32], weights: &[f32]) -> Vec<f32> {
        let width = self.absmax.len().max(1);
        multiply(inputs, weights, [inputs.len() / width, width, weights.len() / width], true, false)
    }

    fn off(&self, wanted: &[Vec<f32>], factors: &[f32], compute: DType) -> f64 {
        let width = factors.len().max(1);
        let mut inputs = self.rows.to_vec();
        scale_columns(&mut inputs, factors, |value, factor| value / factor);
        let scale = (!self.per_token).then(|| activation_scale(self.absmax, Some(factors)));
        round_tokens(&mut inputs, width, scale, None, false);
        let loss = |((block, times), wanted): (&(&[f32], f64), &Vec<f32>)| {
            let mut scaled = block.to_vec();
            scale_columns(&mut scaled, factors, |value, factor| value * factor);
            round_to_nearest(&mut scaled, width, Format::Int8, compute);
            let found = self.product(&inputs, &scaled);
            times
                * std::iter::zip(found, wanted).map(|(found, wanted)| f64::from((found - wanted).powi(2))).sum::<f64>()
        };
        // Summed in their order, whatever the number of threads.
        let losses: Vec<f64> = self.blocks().par_iter().zip(wanted).map(loss).collect();
        losses.iter().sum()
    }
}
